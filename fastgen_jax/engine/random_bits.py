"""Random numbers of the sampler: one for each token of the vocabulary, whatever else runs and on whatever platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)  # of the key schedule


def random_bits(seeds: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """u32[R, count]: the bits of `fold_in(key(seed), position)` for each row of `seeds` u32[R] and `positions` i32[R].

    Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the bits that
    `jax.random.bits` gives, but independent of the flags that change those, and in one pass on a CPU, where JAX's own
    makes five.
    """

    def key_of(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))

    first, second = (word[:, None] for word in jax.vmap(key_of)(seeds, positions).T)  # u32[R, 1]
    keys = (first, second, first ^ second ^ _PARITY)
    high = jnp.broadcast_to(first, (len(seeds), count))  # counters are [0, 0] ... [0, count - 1]
    low = second + jnp.arange(count, dtype=jnp.uint32)
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            high = high + low
            low = high ^ (low << distance | low >> (32 - distance))
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high ^ low
