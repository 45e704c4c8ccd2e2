"""Attention in both directions within spans of tokens, such as those of an image, on top of causal attention.

    positions of one sequence    0 1 2 | 3 4 5 6 | 7 8
                                 text  |  span   | text
    token 4 attends to           0 1 2   3 4 5 6            and with a sliding window of 3 to 2 3 4 5 6

The causal implementation computes all rows and writes the cache; those of spans are then computed again here, in plain
XLA, from the cache. Prompts with images are rare enough for that, and no kernel has to know about spans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_attention.arguments import Attention, CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.quantized import Cache
from pallas_kernels.ragged_attention.rotation import rotated
from pallas_kernels.ragged_attention.xla import attend, scoring_by_kv_head

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

SPAN_QUERIES = 128  # most tokens of one row of `spans`
_TILE_KEYS = 256


def with_spans(causal: Attention, spans: Int32[Array, "P 4"]) -> Attention:
    """`causal` with attention in both directions within `spans`.

    A row of `spans` is (sequence, first token in the batch, number of tokens up to `SPAN_QUERIES`, rest), where `rest` is
    how many tokens there are from the first one to the end of the span that they belong to: they attend to all keys before
    that end. All tokens of a span up to its end are in the batch or in the cache. Rows without tokens come last.
    """

    def attention(
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        k_cache: Cache,
        v_cache: Cache | None,
        index: RaggedIndex,
        layer: CacheLayer,
        scoring: Scoring,
    ) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
        q, k, scoring = rotated(q, k, scoring)
        out, k_cache, v_cache = causal(q, k, v, k_cache, v_cache, index, layer, scoring)
        return _attend_spans(q, out, k_cache, v_cache, index, layer, scoring, spans), k_cache, v_cache

    return attention


def _attend_spans(
    q: Float[Array, "T H D"],
    out: Float[Array, "T H D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
    spans: Int32[Array, "P 4"],
) -> Float[Array, "T H D"]:
    """`out` with the rows of `spans` replaced."""
    num_tokens, _, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    tile = min(SPAN_QUERIES, num_tokens)
    by_head = scoring_by_kv_head(scoring, num_kv_heads)
    tables = layer.first_block + jnp.clip(index.block_tables, 0, layer.num_blocks - 1)
    queries = (q.astype(jnp.float32) * jnp.float32(scoring.scale)).reshape(num_tokens, num_kv_heads, -1, head_dim)
    queries = jnp.pad(queries, [(0, tile), (0, 0), (0, 0), (0, 0)])  # the last tile may reach beyond T
    padded = jnp.pad(out, [(0, tile), (0, 0), (0, 0)])

    def replace(i: jax.Array, padded: jax.Array) -> jax.Array:
        sequence, start, count, rest = spans[i]
        position = index.context_lens[sequence] - index.query_starts[sequence + 1] + start  # of the first query
        end = position + rest
        offsets = jnp.arange(tile, dtype=jnp.int32)
        rows = lax.dynamic_slice_in_dim(queries, start, tile)  # [tile, K, G, D]
        found = attend(
            rows.swapaxes(0, 1)[None],
            (position + jnp.minimum(offsets, count - 1))[None],
            end[None],
            tables[sequence][None],
            k_cache,
            v_cache,
            tile_blocks=max(1, _TILE_KEYS // block_size),
            scoring=by_head,
            last=jnp.broadcast_to(end - 1, (1, tile)),
            value_dim=None if scoring.latents is None else scoring.latents.value_dim,
        )[0].swapaxes(0, 1)
        old = lax.dynamic_slice_in_dim(padded, start, tile)
        new = jnp.where((offsets < count)[:, None, None], found.reshape(old.shape).astype(old.dtype), old)
        return lax.dynamic_update_slice_in_dim(padded, new, start, axis=0)

    return lax.fori_loop(0, jnp.sum(spans[:, 2] > 0), replace, padded)[:num_tokens]
