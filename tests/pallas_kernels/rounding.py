"""What packed weights meet."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.matmul import cpu


def met(x: np.ndarray, storage: str) -> np.ndarray:
    """float64 of the activations that a packed weight in `storage` meets: a CPU that multiplies bfloat16 rounds them."""
    rounds = storage != "float32" and native.available() and cpu.ensure_loaded() and cpu.narrow_group() == 2
    return (x.astype(jnp.bfloat16) if rounds else x).astype(np.float64)
