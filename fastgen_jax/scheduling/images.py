"""The images of a prompt, as far as the scheduler has to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Grid(NamedTuple):
    """Positions of the tokens of an image that has rows and columns.

    Token i is at time `first`, row `first + i // columns` and column `first + i % columns`; the token after the image is at
    `next` in all three.
    """

    first: int
    columns: int
    next: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptImage:
    """An image whose tokens are at positions `[start, stop)` of a prompt.

    `key` identifies its content: equal keys mean equal embeddings. With `is_whole` its tokens attend to each other in both
    directions, so no step computes a part of them and leaves the rest to a later one.
    """

    start: int
    stop: int
    key: bytes
    is_whole: bool
    grid: Grid | None = None
    """None: its tokens are counted like others. Either all images of a prompt have one, or none."""
    content: object = field(repr=False, compare=False)
    """What the engine computes the embeddings from."""


def end_of_chunk(images: Sequence[PromptImage], stop: int) -> int:
    """The end of a chunk that would end at `stop`: the start of an image if that would be within it."""
    for image in images:
        if image.is_whole and image.start < stop < image.stop:
            return image.start
    return stop


def content_of(images: Sequence[PromptImage], start: int, stop: int) -> bytes:
    """What identifies positions `[start, stop)` besides their token ids: the images there, and where they begin."""
    return b"".join(
        image.key + (image.start - start).to_bytes(8, "little", signed=True)
        for image in images
        if image.start < stop and start < image.stop
    )
