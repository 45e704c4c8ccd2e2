"""Pytrees for the arguments of `ragged_attention` that belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from pallas_kernels.pytree import pytree, static
from pallas_kernels.ragged_attention.quantized import Cache

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@pytree
class Plans:
    """What the kernel of a platform derives from the rest of a `RaggedIndex`; made by `plan_layers`."""

    gpu: Any = None
    tpu: Any = None


@pytree
class RaggedIndex:
    """Which tokens belong to which sequence, and where their keys and values are.

        tokens         [ a5 a6 a7 | b0 b1 b2 b3 | c9 | - - ]        T = 10; two tokens of padding
        query_starts   [ 0          3             7    8   8 ]      S = 4: three chunks and an unused row
        context_lens   [ 8          4            10    0     ]

    The caller is responsible for the contents; they are not checked.
    """

    kv_slots: Int[Array, " T"]
    """Where each token is written: block * B + offset, relative to the layer. Slots must be unique. A slot outside
    [0, N*B) marks padding and is dropped."""
    query_starts: Int[Array, " S+1"]
    """Chunk s is the tokens [query_starts[s], query_starts[s+1]). Non-decreasing."""
    context_lens: Int[Array, " S"]
    """Tokens attended to, cached and new; 0 for an unused row, whose chunk is empty."""
    block_tables: Int[Array, "S M"]
    """The blocks of each sequence, relative to the layer. Entries past the context, or before the window of every query,
    are never read."""
    plans: Plans | None = None
    """Made once for all layers by `plan_layers`; None: each call makes its own."""


@pytree
class CacheLayer:
    """The part of a cache that belongs to one layer: blocks [number * num_blocks, (number + 1) * num_blocks)."""

    number: int | Int[Array, ""]
    """Which layer; may be traced."""
    num_blocks: int = static()
    """N, blocks per layer."""

    @property
    def first_block(self) -> Int[Array, ""]:
        return jnp.asarray(self.number, jnp.int32) * self.num_blocks


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Keys and values that are parts of the same rows, as in multi-head latent attention.

    Without a v_cache they are stored once, as keys. With one, the caller is responsible for their being the same:
    implementations may read values from either cache.
    """

    key_dim: int
    """From this number on, q, k and the cache of keys are zero."""
    value_dim: int
    """Values are the first so many numbers of their keys. Only so many numbers of a result count, the others are any finite
    ones."""


@pytree
class Scoring:
    """How the dot product of a query and a key becomes a score."""

    scale: float = static()
    """Factor of the dot product."""
    soft_cap: float | None = static(default=None)
    """Scores become soft_cap * tanh(score / soft_cap)."""
    sliding_window: int | Int[Array, ""] | None = None
    """A query at position p sees keys j with p - sliding_window < j <= p. May be traced; None for all keys up to p."""
    alibi_slopes: Float[Array, " H"] | None = None
    """float32; slope * (j - p) is added after the cap."""
    sinks: Float[Array, " H"] | None = None
    """float32; one additional logit per head that receives probability but has no value."""
    rotation: tuple[Float[Array, "*R T P"], Float[Array, "*R T P"]] | None = None
    """Cosines and sines, float32, with which q and k are rotated first, as by `rotary.rotate`; None: no rotation."""
    rotation_row: Int[Array, ""] | None = None
    """Which of R rotations it is; may be traced. None: `rotation` has the axes T and P alone."""
    latents: Latents | None = static(default=None)
    """None: keys and values are of their own."""


Results: TypeAlias = tuple[jax.Array, Cache, Cache | None]
"""(out, k_cache, v_cache)"""

Attention: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, Cache, Cache | None, RaggedIndex, CacheLayer, Scoring], Results
]
"""The type of `ragged_attention` and of each implementation: (q, k, v, k_cache, v_cache, index, layer, scoring) ->
(out, k_cache, v_cache)."""
