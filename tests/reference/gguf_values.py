"""The values in the tiny GGUF files, a function of each tensor's Hugging Face name."""

from __future__ import annotations

import zlib

import numpy as np

CONSTANTS = {"beta": 0.5, "eps": -1e-6}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normally distributed numbers that are exact in float16, as float32. Constants of xIELU are the usual ones."""
    if name.endswith(tuple(CONSTANTS)):
        return np.full(shape, CONSTANTS[name.rsplit(".", 1)[1]], np.float32)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape).astype(np.float16).astype(np.float32)
