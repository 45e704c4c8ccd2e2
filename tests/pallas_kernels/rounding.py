"""The rounding of activations that are multiplied by packed weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.matmul import cpu


def rounded(x: np.ndarray, storage: str) -> np.ndarray:
    """The activations, in float64, after the rounding of a packed weight in `storage`: a CPU may multiply in bfloat16."""
    rounds = storage != "float32" and native.available() and cpu.ensure_loaded() and cpu.narrow_group() == 2
    return (x.astype(jnp.bfloat16) if rounds else x).astype(np.float64)
