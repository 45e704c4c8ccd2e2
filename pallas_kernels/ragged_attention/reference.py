"""The definition of `ragged_attention`: one query token at a time, written for clarity. Slow; for tests and readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention.arguments import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.packed import is_packed, pack_caches, unpack_cache
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache, gather_blocks, quantize
from pallas_kernels.ragged_attention.rotation import rotated

if TYPE_CHECKING:
    from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def ragged_attention_reference(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
    """See `pallas_kernels.ragged_attention.ragged_attention`."""
    q, k, scoring = rotated(q, k, scoring)
    if is_packed(v_cache, scoring):
        out, keys, values = ragged_attention_reference(q, k, v, *unpack_cache(k_cache), index, layer, scoring)
        assert values is not None
        return out, pack_caches(keys, values), None
    num_tokens, num_heads, head_dim = q.shape
    pool, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    first_block, num_blocks, kv_slots = layer.first_block, layer.num_blocks, index.kv_slots
    query_starts, context_lens = index.query_starts, index.context_lens

    # 1. Write. A slot outside [0, N*B) is padding: it goes to block `pool`, which does not exist, and is dropped.
    is_real = (kv_slots >= 0) & (kv_slots < num_blocks * block_size)
    block = jnp.where(is_real, first_block + kv_slots // block_size, pool)
    offset = kv_slots % block_size

    def put(cache: Cache, new: jax.Array) -> Cache:
        if not isinstance(cache, QuantizedCache):
            return cache.at[block, :, offset].set(new.astype(cache.dtype), mode="drop")
        values, scales = quantize(new, cache.dtype)
        return QuantizedCache(
            values=cache.values.at[block, :, offset].set(values, mode="drop"),
            scales=cache.scales.at[block, :, offset].set(scales, mode="drop"),
        )

    k_cache, v_cache = put(k_cache, k), None if v_cache is None else put(v_cache, v)

    # 2. Attend. Token t is in chunk s, and the last token of a chunk is the last token of its context.
    def attend(t: jax.Array) -> jax.Array:
        s = jnp.sum(query_starts[1:] <= t)  # the number of chunks that end at or before t
        belongs_to_a_chunk = s < context_lens.shape[0]
        s = jnp.minimum(s, context_lens.shape[0] - 1)
        position = context_lens[s] - query_starts[s + 1] + t

        blocks = first_block + jnp.clip(index.block_tables[s], 0, num_blocks - 1)
        keys, values = (
            gather_blocks(cache, blocks).swapaxes(0, 1).reshape(num_kv_heads, -1, head_dim)  # [K, M*B, D]
            for cache in (k_cache, k_cache if v_cache is None else v_cache)
        )
        queries = q[t].reshape(num_kv_heads, group, head_dim).astype(jnp.float32)  # [K, G, D]

        key_positions = jnp.arange(keys.shape[1], dtype=jnp.int32)  # [M*B]
        is_visible = key_positions <= position
        if scoring.sliding_window is not None:
            is_visible &= key_positions > position - scoring.sliding_window
        # Keys outside may hold anything, including NaN: select, never multiply by zero.
        keys = jnp.where(is_visible[None, :, None], keys, 0.0)
        values = jnp.where(is_visible[None, :, None], values, 0.0)

        scores = scoring.scale * jnp.einsum("kgd,kjd->kgj", queries, keys, precision=HIGHEST)
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
        if scoring.alibi_slopes is not None:
            distance = (key_positions - position).astype(jnp.float32)
            scores = scores + scoring.alibi_slopes.reshape(num_kv_heads, group)[:, :, None] * distance[None, None, :]
        scores = jnp.where(is_visible, scores, -jnp.inf)

        # A sink is one additional logit per head: it receives probability but has no value.
        sink = jnp.full((num_heads,), -jnp.inf) if scoring.sinks is None else scoring.sinks
        sink = sink.reshape(num_kv_heads, group, 1)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
        out = jnp.einsum("kgj,kjd->kgd", weights / total, values, precision=HIGHEST)
        return jnp.where(belongs_to_a_chunk, out.reshape(num_heads, head_dim), 0.0).astype(q.dtype)

    # For a derivative, contexts are gathered again rather than kept: there is one per token.
    out = jax.lax.map(jax.checkpoint(attend), jnp.arange(num_tokens, dtype=jnp.int32))
    return out, k_cache, v_cache
