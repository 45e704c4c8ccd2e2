"""Random numbers of the sampler: one for each token of the vocabulary, independent of the batch and of the platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    return bits_of(row_keys(seeds, positions), jnp.arange(count, dtype=jnp.uint32)[None, :])


def row_keys(seeds: UInt32[Array, " R"], positions: Int32[Array, " R"]) -> UInt32[Array, "R 2"]:
    """The words of `fold_in(key(seed), position)` for each row."""
    # key(seed) is [0, seed], and fold_in encrypts [0, position] with it.
    zeros = jnp.zeros((len(seeds), 1), jnp.uint32)
    return jnp.concatenate(_threefry((zeros, seeds[:, None]), positions[:, None].astype(jnp.uint32)), axis=1)


def bits_of(keys: UInt32[Array, "R 2"], ids: UInt32[Array, "#R n"]) -> UInt32[Array, "R n"]:
    """The entries `ids` of the bits of each key."""
    high, low = _threefry((keys[:, :1], keys[:, 1:]), ids)
    return high ^ low


def _threefry(
    key: tuple[UInt32[Array, "R 1"], UInt32[Array, "R 1"]], counters: UInt32[Array, "#R count"]
) -> tuple[UInt32[Array, "R count"], UInt32[Array, "R count"]]:
    """The two words of [0, counter], encrypted with each row's key."""
    first, second = key
    keys = (first, second, first ^ second ^ _PARITY)
    low = second + counters
    high = jnp.broadcast_to(first, low.shape)
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            high = high + low
            low = high ^ (low << distance | low >> (32 - distance))
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high, low
