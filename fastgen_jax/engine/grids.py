"""Positions for the rotary embedding of prompts whose images have rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.scheduling import PromptImage

if TYPE_CHECKING:
    from jaxtyping import Int32


def rope_positions(images: Sequence[PromptImage], start: int, stop: int) -> Int32[np.ndarray, "3 _"]:
    """Time, row and column of positions `[start, stop)` of a sequence with `images`, of which there is at least one."""
    last = images[-1]
    assert last.grid is not None, "the images of a model with such positions have a grid"
    if start >= last.stop:  # as in each step that generates
        return np.broadcast_to(np.arange(start, stop, dtype=np.int32) + (last.grid.next - last.stop), (3, stop - start))
    found = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (3, stop - start)).copy()
    for image in images:
        first, end, grid = max(start, image.start), min(stop, image.stop), image.grid
        assert grid is not None
        if image.start >= stop:
            break
        if first < end:
            rows, columns = np.divmod(np.arange(first - image.start, end - image.start, dtype=np.int32), grid.columns)
            found[:, first - start : end - start] = grid.first + np.stack([np.zeros_like(rows), rows, columns])
        if image.stop < stop:
            after = max(start, image.stop)
            found[:, after - start :] = np.arange(after, stop, dtype=np.int32) + (grid.next - image.stop)
    return found
