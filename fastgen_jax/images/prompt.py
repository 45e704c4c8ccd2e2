"""Prompts with images: pixels for the tower, and the tokens that stand for each image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastgen_jax.images.decode import NamedImage, open_image
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.scheduling.images import PromptImage
from fastgen_jax.text import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = 64  # of a prompt, so that a small request cannot cause hours of work
_KEY_BYTES = 16


class PromptParts(NamedTuple):
    """The tokens of a prompt, and its images."""

    token_ids: list[int]
    images: tuple[PromptImage, ...]


class ImagePrompts:
    """Turns prompts with images into tokens, for one model and its tokenizer. Any thread may use it."""

    def __init__(self, config: ImagesConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the tokenizer lacks the tokens of an image."""
        self.config = config
        self._tokenizer = tokenizer
        ids = (config.start_token_id, config.image_token_id, config.end_token_id)
        try:
            start, image, end = map(tokenizer.token_text, ids)
        except ValueError as error:
            raise ValueError(f"a token of images: {error}; images=False loads the text model") from error
        self.placeholder = start
        """The text that stands for an image in a prompt."""
        self._image = image
        # As transformers writes it for Gemma 3.
        self._shown = f"\n\n{start}{image * config.tower.tokens_per_image}{end}\n\n"

    def parts(self, text: str, images: Sequence[NamedImage], *, add_special_tokens: bool) -> PromptParts:
        """The tokens of a text with `placeholder` at the place of each image; all images come first if it has none.

        Raises ValueError if an image cannot be read, the text has another number of places, or it contains tokens that
        only images have.
        """
        if len(images) > MOST_IMAGES:
            raise ValueError(f"the prompt has {len(images)} images, but at most {MOST_IMAGES} are read; remove some")
        if self._image in text:
            raise ValueError(
                f"the text contains {self._image!r}, which stands for a part of an image; write {self.placeholder!r} at the "
                "place of an image"
            )
        places = text.count(self.placeholder)
        if not places:
            text = self.placeholder * len(images) + text
        elif places != len(images):
            raise ValueError(
                f"the text has {places} places for images ({self.placeholder!r}), but {len(images)} images are passed"
            )
        pixels = [self.pixels(open_image(source, what=what)) for what, source in images]
        ids = self._tokenizer.encode(text.replace(self.placeholder, self._shown), add_special_tokens=add_special_tokens)
        starts = _runs(ids, self.config.image_token_id)
        count = self.config.tower.tokens_per_image
        assert len(starts) == len(images), "the tokenizer has each token of an image as one"
        shown = [
            PromptImage(start=start, stop=start + count, key=_key(values), is_whole=self.config.is_whole, content=values)
            for start, values in zip(starts, pixels, strict=True)
        ]
        return PromptParts(ids, tuple(shown))

    def pixels(self, image: Image) -> np.ndarray:
        """What the tower reads: u8[height, width, 3]."""
        from PIL import Image

        side = self.config.tower.image_size
        return np.asarray(image.resize((side, side), Image.Resampling(self.config.resample)))


def _key(pixels: np.ndarray) -> bytes:
    shape = "x".join(map(str, pixels.shape)).encode()
    return hashlib.blake2b(shape + np.ascontiguousarray(pixels).tobytes(), digest_size=_KEY_BYTES).digest()


def _runs(ids: Sequence[int], token_id: int) -> list[int]:
    """Where runs of a token begin."""
    return [i for i, found in enumerate(ids) if found == token_id and (i == 0 or ids[i - 1] != token_id)]
