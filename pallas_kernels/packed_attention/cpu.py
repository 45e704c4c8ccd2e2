"""Packed attention on a CPU, by the native kernel of `ragged_attention` and a cache that lasts for one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels.ragged_attention import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.cpu.call import ragged_attention_cpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_BLOCK = 64  # tokens in a block of the cache: the kernel's tile of keys


def packed_attention_cpu(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    query_starts: Int[Array, " bounds"],
    scoring: Scoring,
) -> Float[Array, "T H D"]:
    """See `packed_attention`. Keys and values are rounded to their own dtype, as in a cache of that dtype."""
    num_tokens, num_sequences = q.shape[0], query_starts.shape[0] - 1
    lengths = query_starts[1:] - query_starts[:-1]
    blocks = -(-lengths // _BLOCK)
    first_block = jnp.cumsum(blocks, dtype=jnp.int32) - blocks  # of each sequence
    most_blocks = -(-num_tokens // _BLOCK)
    num_blocks = most_blocks + num_sequences  # every sequence may leave a block incomplete
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.sum(query_starts[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(sequence, num_sequences - 1)
    slots = first_block[inside] * _BLOCK + token - query_starts[inside]
    index = RaggedIndex(
        kv_slots=jnp.where(sequence < num_sequences, slots, num_blocks * _BLOCK),
        query_starts=query_starts,
        context_lens=lengths,
        block_tables=first_block[:, None] + jnp.arange(most_blocks, dtype=jnp.int32)[None, :],
    )
    cache = jnp.zeros((num_blocks, k.shape[1], _BLOCK, k.shape[2]), k.dtype)
    layer = CacheLayer(number=0, num_blocks=num_blocks)
    return ragged_attention_cpu(q, k, v, cache, cache, index, layer, scoring)[0]
