"""The checkpoint of tests/reference/vision, and what transformers computed with it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

HOME = Path(__file__).parents[2] / "reference" / "vision"
GEMMA3 = HOME / "gemma3"
PHOTO = HOME / "photo.png"
NUM_GREEDY = 8
TOKENS = 16  # of an image
IMAGE = 7  # the token of an image


@cache
def expected() -> dict[str, np.ndarray]:
    """See make_vision.py."""
    return dict(np.load(GEMMA3 / "expected.npz"))


def starts() -> list[int]:
    """Where the images of the conversation begin."""
    ids = expected()["token_ids"].tolist()
    return [i for i, token in enumerate(ids) if token == IMAGE and ids[i - 1] != IMAGE]
