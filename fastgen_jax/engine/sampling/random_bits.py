"""Random numbers of the sampler: one for each token of the vocabulary, independent of the batch and of the platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)  # of the key schedule


def random_bits(seeds: UInt32[Array, " R"], positions: Int32[Array, " R"], count: int) -> UInt32[Array, "R count"]:
    """The bits of `fold_in(key(seed), position)` for each row.

    Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the bits that
    `jax.random.bits` returns, but independent of the flags that change those, and in one pass on a CPU, where JAX's own
    implementation takes five.
    """

    def key_of(seed: UInt32[Array, ""], position: Int32[Array, ""]) -> UInt32[Array, " 2"]:
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))

    first, second = (word[:, None] for word in jax.vmap(key_of)(seeds, positions).T)  # u32[R, 1]
    keys = (first, second, first ^ second ^ _PARITY)
    high = jnp.broadcast_to(first, (len(seeds), count))  # counters are [0, 0] ... [0, count - 1]
    low = second + jnp.arange(count, dtype=jnp.uint32)[None, :]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            high = high + low
            low = high ^ (low << distance | low >> (32 - distance))
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high ^ low
