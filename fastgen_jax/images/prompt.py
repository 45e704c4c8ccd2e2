"""Prompts with images: pixels for the tower, and the tokens that stand for each image."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastgen_jax.images.decode import NamedImage, open_image
from fastgen_jax.models.vision import towers
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.scheduling.images import Grid, PromptImage
from fastgen_jax.text import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = 64  # of a prompt, so that a small request cannot cause hours of work
_KEY_BYTES = 16


class PromptParts(NamedTuple):
    """The tokens of a prompt, and its images."""

    token_ids: list[int]
    images: tuple[PromptImage, ...]


class _Read(NamedTuple):
    """An image as the tower reads it, and rows and columns of its tokens."""

    key: bytes
    grid: tuple[int, int]
    content: Any


class ImagePrompts:
    """Turns prompts with images into tokens, for one model and its tokenizer. Any thread may use it."""

    def __init__(self, config: ImagesConfig, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the tokenizer lacks the tokens of an image."""
        self.config = config
        self._tokenizer = tokenizer
        ids = (config.start_token_id, config.image_token_id, config.end_token_id)
        try:
            self._start, self._image, self._end = map(tokenizer.token_text, ids)
        except ValueError as error:
            raise ValueError(f"a token of images: {error}; images=False loads the text model") from error
        self.placeholder = "".join(map(tokenizer.token_text, config.marker_token_ids))
        """The text that stands for an image in a prompt."""

    def parts(self, text: str, images: Sequence[NamedImage], *, add_special_tokens: bool) -> PromptParts:
        """The tokens of a text with `placeholder` at the place of each image; all images come first if it has none.

        Raises ValueError if an image cannot be read, the text has another number of places, or it contains tokens that
        only images have.
        """
        if len(images) > MOST_IMAGES:
            raise ValueError(f"the prompt has {len(images)} images, but at most {MOST_IMAGES} are read; remove some")
        plain = text.split(self.placeholder)
        if any(self._image in part for part in plain):
            raise ValueError(
                f"the text contains {self._image!r}, which stands for a part of an image; write {self.placeholder!r} at the "
                "place of an image"
            )
        places = len(plain) - 1
        if not places:
            plain = [*[""] * len(images), text]
        elif places != len(images):
            raise ValueError(
                f"the text has {places} places for images ({self.placeholder!r}), but {len(images)} images are passed"
            )
        read = [self._read(image) for image in images]
        ends = [self._shown(*image.grid) for image in read]
        text = "".join(part for pair in zip(plain, [*ends, ""], strict=True) for part in pair)
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        starts = _runs(ids, self.config.image_token_id)
        assert len(starts) == len(images), "the tokenizer has each token of an image as one"
        return PromptParts(ids, tuple(self._placed(read, starts)))

    def pixels(self, image: Image) -> np.ndarray:
        """The image in the size in which it is read: u8[height, width, 3]; ValueError if it is too narrow."""
        from PIL import Image

        size = self.config.tower.resized(*image.size)
        return np.asarray(image.resize(size, Image.Resampling(self.config.resample)))

    def _read(self, image: NamedImage) -> _Read:
        tower, opened = self.config.tower, open_image(image.source, what=image.what)
        try:
            pixels = self.pixels(opened)
            content = towers.inputs(pixels, config=tower)
        except ValueError as error:
            raise ValueError(f"{image.what} {error}") from None
        return _Read(_key(pixels), tower.grid(pixels.shape[1], pixels.shape[0]), content)

    def _shown(self, rows: int, columns: int) -> str:
        """The text of an image with so many tokens, as the processor of transformers writes it."""
        around = self.config.around
        return f"{around}{self._start}{self._image * (rows * columns)}{self._end}{around}"

    def _placed(self, read: Sequence[_Read], starts: Sequence[int]) -> Iterator[PromptImage]:
        """The images whose tokens begin at `starts`."""
        grid, ahead = None, 0  # what is added to the number of tokens to get a position
        for image, start in zip(read, starts, strict=True):
            (rows, columns), stop = image.grid, start + math.prod(image.grid)
            if self.config.in_grid:
                grid = Grid(start + ahead, columns, start + ahead + max(rows, columns))
                ahead = grid.next - stop
            yield PromptImage(
                start=start, stop=stop, key=image.key, is_whole=self.config.is_whole, grid=grid, content=image.content
            )


def _key(pixels: np.ndarray) -> bytes:
    shape = "x".join(map(str, pixels.shape)).encode()
    return hashlib.blake2b(shape + np.ascontiguousarray(pixels).tobytes(), digest_size=_KEY_BYTES).digest()


def _runs(ids: Sequence[int], token_id: int) -> list[int]:
    """Where runs of a token begin."""
    return [i for i, found in enumerate(ids) if found == token_id and (i == 0 or ids[i - 1] != token_id)]
