"""The numbers in the tiny GGUF files, which are a function of a tensor's Hugging Face name."""

from __future__ import annotations

import zlib

import numpy as np


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that float16 can hold, as float32."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape).astype(np.float16).astype(np.float32)
