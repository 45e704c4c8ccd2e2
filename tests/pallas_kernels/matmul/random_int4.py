"""Stacks of weights of 4 bits, with any bits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import Int4Weight


def random_int4(
    count: int, num_inputs: int, num_outputs: int, *, size: int, scales: str, offsets: bool, seed: int
) -> Int4Weight:
    """`count` matrices whose numbers are about 1."""
    rng = np.random.default_rng(seed)
    shape = (count, num_inputs // size, num_outputs)
    return Int4Weight(
        values=jnp.asarray(rng.integers(0, 256, (count, num_inputs // 2, num_outputs), np.uint8)),
        scales=jnp.asarray(rng.uniform(0.1, 0.3, shape) * rng.choice([-1, 1], shape), scales),
        offsets=jnp.asarray(rng.normal(size=shape), scales) if offsets else None,
    )
