"""Ragged attention in plain XLA: the production path on any platform where no kernel is available.

Two loops share one online softmax over tiles of keys:
  - rows with a single query (generating sequences) run together, in groups of similar context length;
  - longer chunks run one tile of queries at a time.
Trip counts come from the contexts in the batch, so neither the size of the cache nor the width of the block table
costs time. Keys are fetched one tile at a time: nothing as large as a context is ever materialized.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import gpu_target
from pallas_kernels.ragged_attention.arguments import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.packed import pack, quantize_packed
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache, gather_blocks, quantize

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
    """What one iteration of a loop computes."""

    single_keys: int
    chunk_keys: int
    chunk_queries: int = 128
    group: int  # rows with a single query that run together; a group takes as long as its longest context


# Measured on a 2-core CPU: with fewer keys per tile the loop overhead grows, with more the tile overflows the L2 cache.
_TILES = _Tiles(single_keys=128, chunk_keys=256, group=16)
# On a GPU an iteration launches a dozen kernels, after the host has read the loop's condition.
_GPU_TILES = _Tiles(single_keys=512, chunk_keys=512, group=32)

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringByKVHead:
    """How a dot product becomes a score; heads are laid out as [K, G]."""

    window: jax.Array | None  # i32 scalar
    soft_cap: float | None
    slopes: jax.Array | None  # f32[K, G]
    sinks: jax.Array | None  # f32[K, G]


def ragged_attention_xla(
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
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    k_cache, v_cache = write_kv(k, v, k_cache, v_cache, kv_slots=index.kv_slots, layer=layer)

    by_kv_head = scoring_by_kv_head(scoring, num_kv_heads)
    tables = layer.first_block + jnp.clip(index.block_tables, 0, layer.num_blocks - 1)
    queries = (q.astype(jnp.float32) * jnp.float32(scoring.scale)).astype(_operand_dtype(k_cache, q.dtype))
    queries = queries.reshape(num_tokens, num_kv_heads, group, head_dim)
    query_lens = index.query_starts[1:] - index.query_starts[:-1]
    where = (k_cache, v_cache, tables, index.query_starts, query_lens, index.context_lens)
    value_dim = None if scoring.latents is None else scoring.latents.value_dim
    out = jnp.zeros(queries.shape, jnp.float32)
    if num_tokens > 1:  # a chunk of several tokens fits
        out = _attend_chunks(queries, out, *where, value_dim=value_dim, scoring=by_kv_head)
    out = _attend_single_rows(queries, out, *where, value_dim=value_dim, scoring=by_kv_head)
    return out.reshape(q.shape).astype(q.dtype), k_cache, v_cache


def _tiles() -> _Tiles:
    return _GPU_TILES if gpu_target.is_gpu() else _TILES


def _operand_dtype(cache: Cache, dtype: DTypeLike) -> jnp.dtype:
    """The dtype of both products, for activations of `dtype`; they are always summed in float32.

    A GPU multiplies 16 bits faster than 32, and keys that are fetched in them are half as many bytes.
    """
    stored = dtype if isinstance(cache, QuantizedCache) else cache.dtype
    return jnp.dtype(stored if gpu_target.is_gpu() and jnp.dtype(stored).itemsize == 2 else jnp.float32)


def scoring_by_kv_head(scoring: Scoring, num_kv_heads: int) -> ScoringByKVHead:
    """`scoring` with the heads as [K, G]."""
    window, slopes, sinks = scoring.sliding_window, scoring.alibi_slopes, scoring.sinks
    return ScoringByKVHead(
        window=None if window is None else jnp.asarray(window, jnp.int32),
        soft_cap=scoring.soft_cap,
        slopes=None if slopes is None else slopes.reshape(num_kv_heads, -1),
        sinks=None if sinks is None else sinks.reshape(num_kv_heads, -1),
    )


def write_kv(
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    *,
    kv_slots: Int[Array, " T"],
    layer: CacheLayer,
) -> tuple[Cache, Cache | None]:
    """The caches with `k[t]`, `v[t]` at slot `kv_slots[t]` of `layer`; slots outside [0, N*B) are dropped.

    Without a v_cache, the rows of k_cache are keys and values of 2D numbers, or keys of D numbers alone.
    """
    pool, num_kv_heads, block_size, width = k_cache.shape
    # A scatter of whole rows [D]: one that indexes the axes before and after the heads makes XLA:TPU transpose the pool.
    is_real = (kv_slots >= 0) & (kv_slots < layer.num_blocks * block_size)
    block = layer.first_block + kv_slots // block_size

    def rows_of(num_heads: int) -> jax.Array:
        """Where each token and head is in an array [L*N, num_heads, B, ...]."""
        first = block * (num_heads * block_size) + kv_slots % block_size  # of the first head; the next is B rows on
        rows = first[:, None] + block_size * jnp.arange(num_heads, dtype=jnp.int32)[None, :]
        rows = jnp.where(is_real[:, None], rows, pool * num_heads * block_size).reshape(-1)
        if num_heads * kv_slots.shape[0] == 1:
            # XLA:CPU rewrites a scatter of one row so that it copies the whole cache. A second, dropped row avoids this.
            rows = jnp.concatenate([rows, jnp.full((1,), pool * num_heads * block_size, jnp.int32)])
        return rows

    rows = rows_of(num_kv_heads)

    def put(cache: Cache, new: jax.Array) -> Cache:
        if isinstance(cache, QuantizedCache):
            num_scales = cache.scales.shape[1]
            is_packed = num_scales != num_kv_heads
            values, scales = (quantize_packed if is_packed else quantize)(new, cache.dtype)
            flat = put_flat(cache.scales.reshape(-1), rows_of(num_scales) if is_packed else rows, scales.reshape(-1))
            return QuantizedCache(values=put_rows(cache.values, values), scales=flat.reshape(cache.scales.shape))
        return put_rows(cache, new.astype(cache.dtype))

    def put_rows(cache: jax.Array, new: jax.Array) -> jax.Array:
        return put_flat(cache.reshape(-1, width), rows, new.reshape(-1, width)).reshape(cache.shape)

    def put_flat(flat: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
        if rows.shape[0] > new.shape[0]:
            new = jnp.concatenate([new, new])
        return flat.at[rows].set(new, mode="drop")

    if v_cache is None:
        return put(k_cache, k if width == k.shape[-1] else pack(k, v)), None
    return put(k_cache, k), put(v_cache, v)


def _attend_single_rows(
    queries,
    out,
    k_cache,
    v_cache,
    tables,
    query_starts,
    query_lens,
    context_lens,
    *,
    value_dim: int | None,
    scoring: ScoringByKVHead,
) -> jax.Array:
    """Fills the rows of `out` that belong to chunks of one token."""
    num_sequences = tables.shape[0]
    num_tokens = queries.shape[0]
    block_size = k_cache.shape[2]
    width = min(_tiles().group, num_sequences)
    tile_blocks = max(1, _tiles().single_keys // block_size)

    contexts = jnp.where(query_lens == 1, context_lens, 0)
    order = jnp.argsort(-contexts)  # long contexts share a group; rows without work come last
    order = jnp.pad(order, (0, -num_sequences % width), constant_values=num_sequences)
    contexts = jnp.pad(contexts, (0, 1))
    num_groups = -(-jnp.sum(contexts > 0) // width)

    def attend_group(i: jax.Array, out: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(order, (i * width,), (width,))
        tokens = query_starts[jnp.minimum(rows, num_sequences - 1)]
        context = contexts[rows]
        result = attend(
            queries[jnp.minimum(tokens, num_tokens - 1)][:, :, None],  # [W, K, 1, G, D]
            (context - 1)[:, None],
            context,
            tables[jnp.minimum(rows, num_sequences - 1)],
            k_cache,
            v_cache,
            tile_blocks=tile_blocks,
            scoring=scoring,
            value_dim=value_dim,
        )
        target = jnp.where(context > 0, tokens, num_tokens)
        return out.at[target].set(result[:, :, 0], mode="drop")

    return lax.fori_loop(0, num_groups, attend_group, out)


def _attend_chunks(
    queries,
    out,
    k_cache,
    v_cache,
    tables,
    query_starts,
    query_lens,
    context_lens,
    *,
    value_dim: int | None,
    scoring: ScoringByKVHead,
) -> jax.Array:
    """Fills the rows of `out` that belong to chunks of several tokens, one tile of queries after another."""
    num_tokens = queries.shape[0]
    block_size = k_cache.shape[2]
    tile = min(_tiles().chunk_queries, num_tokens)
    tile_blocks = max(1, _tiles().chunk_keys // block_size)

    tiles = jnp.where(query_lens > 1, -(-query_lens // tile), 0)
    ends = jnp.cumsum(tiles)  # tile i belongs to the first sequence whose end is above i
    padding = [(0, tile), (0, 0), (0, 0), (0, 0)]  # the last tile may reach beyond T
    queries, out = jnp.pad(queries, padding), jnp.pad(out, padding)

    def attend_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        s = jnp.sum(ends <= i)
        start = query_starts[s] + (i - (ends[s] - tiles[s])) * tile
        first = context_lens[s] - query_starts[s + 1] + start  # position of the tile's first query
        count = jnp.minimum(tile, query_starts[s + 1] - start)
        rows = lax.dynamic_slice_in_dim(queries, start, tile)  # [tile, K, G, D]
        offsets = jnp.arange(tile, dtype=jnp.int32)
        result = attend(
            rows.swapaxes(0, 1)[None],
            (first + jnp.minimum(offsets, count - 1))[None],
            (first + count)[None],
            tables[s][None],
            k_cache,
            v_cache,
            tile_blocks=tile_blocks,
            scoring=scoring,
            value_dim=value_dim,
        )[0].swapaxes(0, 1)
        old = lax.dynamic_slice_in_dim(out, start, tile)
        new = jnp.where((offsets < count)[:, None, None, None], result, old)
        return lax.dynamic_update_slice_in_dim(out, new, start, axis=0)

    return lax.fori_loop(0, ends[-1], attend_tile, out)[:num_tokens]


def attend(
    queries: jax.Array,
    positions: jax.Array,
    contexts: jax.Array,
    tables: jax.Array,
    k_cache: Cache,
    v_cache: Cache | None,
    *,
    tile_blocks: int,
    scoring: ScoringByKVHead,
    last: jax.Array | None = None,
    value_dim: int | None = None,
) -> jax.Array:
    """Softmax-weighted values [W, K, Q, G, D] for W independent tiles of Q queries, each on its own context.

    Args:
      queries: [W, K, Q, G, D], scaled, in the dtype of the products.
      positions: i32[W, Q], ascending within a row.
      contexts: i32[W], keys that exist for a tile; 0 for a tile without work, whose result is 0.
      tables: i32[W, M], blocks of the flat pool.
      last: i32[W, Q], the last position that a query attends to; None: its own.
      value_dim: values are the first so many numbers of their keys, and zeros follow in the result; None: those in v_cache.
    """
    width, num_kv_heads, num_queries, group, head_dim = queries.shape
    block_size = k_cache.shape[2]
    max_blocks = tables.shape[1]
    tile_blocks = min(tile_blocks, max_blocks)
    rows = queries.reshape(width, num_kv_heads, num_queries * group, head_dim)
    row_positions = jnp.repeat(positions, group, axis=1)  # [W, Q*G]
    row_last = row_positions if last is None else jnp.repeat(last, group, axis=1)

    def per_row(of_head: jax.Array | None) -> jax.Array | None:  # [K, G] -> [K, Q*G]
        return None if of_head is None else jnp.tile(of_head, (1, num_queries))

    row_slopes, row_sinks = per_row(scoring.slopes), per_row(scoring.sinks)

    num_blocks = -(-contexts // block_size)  # [W]
    first_block = jnp.zeros_like(num_blocks)
    if scoring.window is not None:
        first_block = jnp.maximum(0, positions[:, 0] - scoring.window + 1) // block_size
    num_steps = jnp.max(-(-(num_blocks - first_block) // tile_blocks))

    def fetch(cache: Cache, ids: jax.Array) -> jax.Array:
        tile = gather_blocks(cache, ids).astype(rows.dtype).swapaxes(1, 2)  # [W, K, t, B, D]
        return tile.reshape(width, num_kv_heads, tile_blocks * block_size, tile.shape[-1])

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, acc = state
        block = (first_block + i * tile_blocks)[:, None] + jnp.arange(tile_blocks, dtype=jnp.int32)[None, :]  # [W, t]
        ids = jnp.take_along_axis(tables, jnp.minimum(block, max_blocks - 1), axis=1)
        ids = jnp.where(block < num_blocks[:, None], ids, 0)
        offset = jnp.arange(block_size, dtype=jnp.int32)
        key_position = (block[:, :, None] * block_size + offset[None, None, :]).reshape(width, -1)  # [W, J], J = t * B

        keys = fetch(k_cache, ids)  # [W, K, J, D], or 2D
        scores = _einsum("wkrd,wkjd->wkrj", rows, keys[..., :head_dim])  # [W, K, Q*G, J]
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
        distance = key_position[:, None, :] - row_positions[:, :, None]  # [W, Q*G, J]
        if row_slopes is not None:
            scores = scores + row_slopes[None, :, :, None] * distance.astype(jnp.float32)[:, None]
        visible = distance <= 0 if last is None else key_position[:, None, :] <= row_last[:, :, None]
        if scoring.window is not None:
            visible &= distance > -scoring.window
        visible &= (key_position < contexts[:, None])[:, None]
        scores = jnp.where(visible[:, None], scores, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))  # [W, K, Q*G]
        # A row without any visible key so far keeps -inf; subtracting 0 instead makes its weights exp(-inf) = 0, not NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - base[..., None])
        keep = jnp.exp(top - base)
        # Select, since values outside a context or before the window may be NaN.
        exists = key_position < contexts[:, None]
        if scoring.window is not None:
            exists &= key_position > positions[:, :1] - scoring.window
        if value_dim is not None:
            values = keys[..., :value_dim]
        else:
            values = keys[..., head_dim:] if v_cache is None else fetch(v_cache, ids)
        values = jnp.where(exists[:, None, :, None], values, jnp.zeros((), rows.dtype))
        acc = acc * keep[..., None] + _einsum("wkrj,wkjd->wkrd", weights.astype(rows.dtype), values)
        return new_top, total * keep + jnp.sum(weights, axis=-1), acc

    start = (
        jnp.full(rows.shape[:3], -jnp.inf, jnp.float32),
        jnp.zeros(rows.shape[:3], jnp.float32),
        jnp.zeros((*rows.shape[:3], value_dim or head_dim), jnp.float32),
    )
    top, total, acc = lax.fori_loop(0, num_steps, step, start)
    if row_sinks is not None:
        row_sinks = row_sinks[None]
        base = jnp.maximum(top, row_sinks)
        keep = jnp.exp(top - base)
        total, acc = total * keep + jnp.exp(row_sinks - base), acc * keep[..., None]
    result = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
    if value_dim is not None:
        result = jnp.pad(result, [(0, 0)] * 3 + [(0, head_dim - value_dim)])
    return result.reshape(queries.shape)
