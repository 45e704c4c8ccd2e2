"""The checkpoints of tests/reference/vision, and what transformers computed with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HOME = Path(__file__).parents[2] / "reference" / "vision"
GEMMA3 = HOME / "gemma3"
QWEN = tuple(HOME / name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"))
PHOTO = HOME / "photo.png"
NUM_GREEDY = 8
TOKENS = 16  # of an image of Gemma 3
IMAGE = 7  # the token of an image of Gemma 3


@cache
def expected(folder: Path = GEMMA3) -> dict[str, np.ndarray]:
    """See make_vision.py and make_qwen_vision.py."""
    return dict(np.load(folder / "expected.npz"))


def pictures(folder: Path) -> list[Image.Image]:
    """The images of the conversation."""
    with Image.open(PHOTO) as file:
        photo = file.convert("RGB")
    return [photo, ImageOps.mirror(photo) if folder == GEMMA3 else photo.crop((10, 5, 34, 19))]


def answer(folder: Path) -> list[int]:
    """The tokens that transformers generates."""
    return expected(folder)["token_ids"][-NUM_GREEDY:].tolist()


def starts() -> list[int]:
    """Where the images of Gemma's conversation begin."""
    ids = expected()["token_ids"].tolist()
    return [i for i, token in enumerate(ids) if token == IMAGE and ids[i - 1] != IMAGE]
