"""What a checkpoint says about its images: the tower, and how an image becomes tokens of a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastgen_jax.models.moe_config import Activation


@dataclass(frozen=True, kw_only=True)
class TowerWeight:
    """One array of a tower (of one of its layers), and the tensor of the checkpoint that it is."""

    tensor: str
    """Its name, with `{number}` if there are several, without the prefixes that depend on the version of the file."""
    shape: tuple[int, ...]
    """As stored."""
    is_matrix: bool = False
    """Whether it is stored [out, ...] and used as [in, out], with all other axes as one."""
    count: int | None = None
    """How many there are, which are stacked; None: one, not stacked."""

    @property
    def tensors(self) -> list[str]:
        """The names of all of them."""
        return [self.tensor.format(number=number) for number in range(1 if self.count is None else self.count)]

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return len(self.tensors) * math.prod(self.shape)


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
        _check_heads(self.embed_dim, self.num_heads)

    @property
    def patches_per_side(self) -> int:
        """Patches in a row, and rows of patches, of an image."""
        return self.image_size // self.patch_size

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest image."""
        return self.tokens_per_image

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The size in which an image is read."""
        return self.image_size, self.image_size

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of a size from `resized`."""
        side = math.isqrt(self.tokens_per_image)
        return side, side

    @property
    def shown(self) -> str:
        """Sizes of images, in words."""
        return f"{self.image_size} x {self.image_size} pixels, {self.most_tokens} tokens an image"


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """The tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, for images of many sizes. A token is a square of patches."""

    patch_size: int
    """Pixels."""
    merge: int
    """Patches on a side of a token."""
    frames: int
    """Pictures that a patch has in a video; those of an image are equal."""
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    norm: Literal["rms", "layer"]
    activation: Activation
    is_gated: bool
    """Whether the MLP is act(gate(x)) * up(x)."""
    patch_bias: bool
    position_side: int | None
    """Rows and columns of a table of learned positions, between which those of patches are interpolated; None: no table."""
    window: int | None
    """Tokens on a side of the windows that patches attend in; None: they attend to all."""
    full_layers: tuple[int, ...]
    """The layers that attend to all patches in spite of `window`."""
    deep_layers: tuple[int, ...]
    """Layers whose results are also merged; the decoder adds the first after its first layer, and so on (DeepStack)."""
    text_dim: int
    """E of the decoder."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    """Pixels are (value * rescale - mean) / std."""
    least_pixels: int
    most_pixels: int
    """Images are resized to a number of pixels between these."""

    def __post_init__(self) -> None:
        _check_heads(self.embed_dim, self.num_heads)
        if self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"hidden_size is {self.embed_dim} with {self.num_heads} heads; the dimensions of a head must be a multiple "
                "of 4, because rows and columns each rotate half of its pairs"
            )
        if not self.token_pixels <= self.most_pixels or not 0 < self.least_pixels <= self.most_pixels:
            raise ValueError(
                f"images have {self.least_pixels} to {self.most_pixels} pixels; the first must be at least 1, the second "
                f"at least the first and the {self.token_pixels} of a token"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window_size is less than a token of {self.merge} x {self.merge} patches")
        if any(not 0 <= layer < self.num_layers for layer in self.deep_layers):
            raise ValueError(f"deepstack_visual_indexes is {self.deep_layers}; the layers are 0 to {self.num_layers - 1}")

    @property
    def token_side(self) -> int:
        """Pixels on a side of a token."""
        return self.patch_size * self.merge

    @property
    def token_pixels(self) -> int:
        """Pixels of a token."""
        return self.token_side**2

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest image, if it is not so narrow that its size is determined by `token_side`."""
        return self.most_pixels // self.token_pixels

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The size in which an image is read: multiples of `token_side` with nearly the same aspect ratio.

        Raises ValueError for an image that is more than `MOST_RATIO` times as long as wide.
        """
        if max(width, height) > MOST_RATIO * min(width, height):
            raise ValueError(f"has {width} x {height} pixels; the longer side may be at most {MOST_RATIO} times the other")
        side = self.token_side
        sizes = [round(length / side) * side for length in (width, height)]
        if math.prod(sizes) > self.most_pixels:
            shrink = math.sqrt(width * height / self.most_pixels)
            sizes = [max(side, math.floor(length / shrink / side) * side) for length in (width, height)]
        elif math.prod(sizes) < self.least_pixels:
            grow = math.sqrt(self.least_pixels / (width * height))
            sizes = [math.ceil(length * grow / side) * side for length in (width, height)]
        return sizes[0], sizes[1]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of a size from `resized`."""
        return height // self.token_side, width // self.token_side

    @property
    def shown(self) -> str:
        """Sizes of images, in words."""
        pixels = f"{self.least_pixels:,} to {self.most_pixels:,} pixels"
        return f"{pixels}, a token for {self.token_side} x {self.token_side}, up to {self.most_tokens:,} an image"


MOST_RATIO = 200  # of the sides of an image, as in transformers
TowerConfig: TypeAlias = SiglipConfig | QwenVisionConfig


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How a model reads images."""

    tower: TowerConfig
    image_token_id: int
    """The token whose embeddings are replaced by the rows of the tower."""
    start_token_id: int
    """The token before them."""
    end_token_id: int
    """The token after them."""
    marker_token_ids: tuple[int, ...]
    """The tokens that mark the place of an image in a text."""
    around: str
    """The text before the first and after the last of its tokens."""
    resample: int
    """Pillow's number of the filter with which an image is resized: 2 bilinear, 3 bicubic."""
    is_whole: bool
    """Whether the tokens of an image attend to each other in both directions, so that one step must compute all of them."""
    in_grid: bool
    """Whether the rotary embedding of the decoder gets the row and column of the tokens of an image."""

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest image."""
        return self.tower.most_tokens


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"hidden_size is {embed_dim}; it must be a multiple of num_attention_heads={num_heads}")
