"""Memory of the host that a JAX CPU device uses as it is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes, XLA's for buffers on a CPU


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialized array that `jax.device_put` to a CPU device does not copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
