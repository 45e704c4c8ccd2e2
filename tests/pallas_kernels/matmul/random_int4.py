"""Stacks of weights of 4 bits, with any bits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import Int4Weight


def random_int4(
    count: int, num_inputs: int, num_outputs: int, *, size: int, scales: str, offsets: bool, seed: int
) -> Int4Weight:
    """`count` matrices whose numbers are about 1. They are exact in float32, however they are computed."""
    rng = np.random.default_rng(seed)
    shape = (count, num_inputs // size, num_outputs)

    def rounded(array: np.ndarray) -> jnp.ndarray:
        return jnp.asarray(np.rint(array * 2**14) / 2**14, scales)  # finer than float16

    return Int4Weight(
        values=jnp.asarray(rng.integers(0, 256, (count, num_inputs // 2, num_outputs), np.uint8)),
        scales=rounded(rng.uniform(0.1, 0.3, shape) * rng.choice([-1, 1], shape)),
        offsets=rounded(rng.normal(size=shape)) if offsets else None,
    )
