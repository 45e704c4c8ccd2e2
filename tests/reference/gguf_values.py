"""The values in the tiny GGUF files, a function of each tensor's Hugging Face name."""

from __future__ import annotations

import zlib

import numpy as np


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normally distributed numbers that are exact in float16, as float32."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape).astype(np.float16).astype(np.float32)
