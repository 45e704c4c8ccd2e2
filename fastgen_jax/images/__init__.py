"""Images in prompts: reading and checking them, and their places among the tokens. Pillow decodes and resizes."""

from fastgen_jax.images.decode import MAX_BYTES, MAX_PIXELS, ImageSource, decode, open_image
from fastgen_jax.images.messages import take_images
from fastgen_jax.images.prompt import ImagePrompts, PromptParts

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "ImagePrompts",
    "ImageSource",
    "PromptParts",
    "decode",
    "open_image",
    "take_images",
]
