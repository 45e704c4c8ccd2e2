"""What a checkpoint says about its images: the tower, and how an image becomes tokens of a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgen_jax.models.moe_config import Activation


@dataclass(frozen=True, kw_only=True)
class TowerWeight:
    """One array of a tower (of one of its layers), and the tensor of the checkpoint that it is."""

    tensor: str
    """Its name, with `{layer}` for the number of the layer, without the prefixes that depend on the version of the file."""
    shape: tuple[int, ...]
    """As stored."""
    is_matrix: bool = False
    """Whether it is stored [out, ...] and used as [in, out], with all other axes as one."""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.tensor


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """A SigLIP tower with Gemma 3's projector, which averages squares of patches. Sizes of images and patches in pixels."""

    image_size: int
    patch_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    norm_eps: float
    activation: Activation
    tokens_per_image: int
    text_dim: int
    """E of the decoder."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    """Pixels are (value * rescale - mean) / std."""

    def __post_init__(self) -> None:
        side = math.isqrt(self.tokens_per_image)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; it must be a multiple of patch_size={self.patch_size}")
        if side * side != self.tokens_per_image or self.patches_per_side % side:
            raise ValueError(
                f"mm_tokens_per_image is {self.tokens_per_image}; it must be a square whose side divides the "
                f"{self.patches_per_side} patches of a side"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.embed_dim}; it must be a multiple of num_attention_heads={self.num_heads}"
            )

    @property
    def patches_per_side(self) -> int:
        """Patches in a row, and rows of patches, of an image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How a model reads images."""

    tower: SiglipConfig
    image_token_id: int
    """The token whose embeddings are replaced by the rows of the tower."""
    start_token_id: int
    """The token before them, which also marks the place of an image in a prompt."""
    end_token_id: int
    """The token after them."""
    resample: int
    """Pillow's number of the filter with which an image is resized: 2 bilinear, 3 bicubic."""
    is_whole: bool
    """Whether the tokens of an image attend to each other in both directions, so that one step must compute all of them."""

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest image."""
        return self.tower.tokens_per_image
