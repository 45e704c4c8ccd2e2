"""Ragged attention on a Hopper GPU: XLA writes the step's keys and values in place, one Mosaic-GPU kernel attends.

The kernel (`gpu_kernel.py`) runs twice: over tiles of several queries, and over pieces of the contexts of single queries,
whose partial results XLA combines.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_attention.gpu_kernel import GRANULE, NUM_COLUMNS, WARPGROUP_ROWS, Spec, attend_tiles
from pallas_kernels.ragged_attention.gpu_support import unsupported
from pallas_kernels.ragged_attention.quantized import Cache
from pallas_kernels.ragged_attention.xla import write_kv

NO_WINDOW = 2**30  # far beyond any context, and position - window stays in int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """How the GPU kernel cuts its work. Any choice gives the same result; the compiler refuses what does not fit."""

    chunk_keys: int  # keys of a step of a chunk tile
    chunk_stages: int  # steps whose keys and values are in shared memory at once
    single_keys: int
    single_stages: int
    pieces: int  # that the contexts of all single queries are cut into, over all KV heads
    min_piece: int  # keys below which cutting costs more than it gives
    blocks: int  # thread blocks that share the tiles


MULTIPROCESSORS = 132  # of an H100 SXM; one thread block runs on each
SHARED_BYTES = 225 * 1024  # of the 227 KiB of a thread block; barriers take some


def modelled(head_dim: int) -> GpuTiles:
    """Tiles for a head size: as many stages as fit in shared memory."""
    # Beyond 128 the accumulator takes 128 registers a thread, and fewer scores fit beside it.
    keys = 128 if head_dim <= 128 else 64

    def stages(rows: int) -> int:
        return max(2, min(4, (SHARED_BYTES - 2 * head_dim * rows) // (4 * head_dim * keys)))

    return GpuTiles(
        chunk_keys=keys,
        chunk_stages=stages(2 * WARPGROUP_ROWS),
        single_keys=keys,
        single_stages=stages(3 * WARPGROUP_ROWS),  # the float32 results take as much as two tiles of queries
        # Eight for each multiprocessor, so that those that got one more than others run an eighth longer at most.
        pieces=8 * MULTIPROCESSORS,
        min_piece=256,
        blocks=MULTIPROCESSORS,
    )


def ragged_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: Cache,
    v_cache: Cache,
    *,
    kv_slots: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    layer: int | jax.Array,
    num_blocks: int,
    scale: float,
    sliding_window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    tiles: GpuTiles | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, Cache, Cache]:
    """Same arguments and results as `pallas_kernels.ragged_attention.ragged_attention`, which describes them.

    q is rounded to the dtype of the caches. `tiles` None takes those of the head size; `interpret` is that of
    `plgpu.kernel`. Raises ValueError for what `unsupported` names.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    reason = unsupported(k_cache, num_heads)
    if reason:
        raise ValueError(f"implementation='gpu' {reason}, or use implementation='xla'")
    tiles = tiles or modelled(head_dim)
    group = num_heads // num_kv_heads
    layer = jnp.asarray(layer, jnp.int32)
    k_cache, v_cache = write_kv(k, v, k_cache, v_cache, kv_slots=kv_slots, layer=layer, num_blocks=num_blocks)

    common: dict[str, Any] = {
        "group": group, "head_dim": head_dim, "block_size": block_size, "scale": scale, "soft_cap": soft_cap,
        "has_window": sliding_window is not None, "blocks": tiles.blocks, "dtype": k_cache.dtype,
        "interpreted": bool(interpret),
    }  # fmt: skip
    window = NO_WINDOW if sliding_window is None else jnp.minimum(sliding_window, NO_WINDOW)
    window = jnp.asarray(window, jnp.int32)
    queries = q.reshape(num_tokens, num_kv_heads, group, head_dim).astype(k_cache.dtype)
    operands = {"k_cache": k_cache, "v_cache": v_cache, "tables": block_tables}
    of_heads = {name: x for name, x in (("slopes", alibi_slopes), ("sinks", sinks)) if x is not None}
    lengths = query_starts[1:] - query_starts[:-1]
    index = {"query_starts": query_starts, "context_lens": context_lens, "first_block": layer * num_blocks,
             "window": window}  # fmt: skip

    spec = Spec(
        **common, warpgroups=1 if group <= WARPGROUP_ROWS else 2, keys=tiles.single_keys, stages=tiles.single_stages,
        partial=True,
    )  # fmt: skip
    work, starts, pieces, most = plan_pieces(**index, num_kv_heads=num_kv_heads, tiles=tiles, spec=spec)
    rows = queries[jnp.minimum(query_starts[:-1], num_tokens - 1)]  # [S, K, G, D]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, spec.rows_out - group), (0, 0)))
    partial, lse = launch(work, operands | {"q": rows} | _by_row(of_heads, spec), spec=spec, interpret=interpret)
    single = combine(partial[:, :, :group], lse[:, :, :group], starts, pieces, most=most)  # f32[S, K, G, D]

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.sum(query_starts[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    in_a_chunk = (token >= query_starts[0]) & (token < query_starts[-1])
    sequence = jnp.minimum(sequence, context_lens.shape[0] - 1)  # of each token
    out = single[sequence].astype(q.dtype)  # [T, K, G, D]
    if num_tokens > 1:
        spec = Spec(
            **common, warpgroups=2, keys=tiles.chunk_keys, stages=tiles.chunk_stages, partial=False
        )
        work, tile, row = plan_chunks(**index, num_tokens=num_tokens, sequence=sequence, spec=spec)
        # Rows of the G heads of a KV head side by side; the last tile reaches beyond T.
        rows = queries.swapaxes(0, 1).reshape(num_kv_heads, num_tokens * group, head_dim)
        rows = jnp.pad(rows, ((0, 0), (0, spec.rows + -(num_tokens * group) % GRANULE), (0, 0)))
        # [tiles, K, R, D]
        rows = launch(work, operands | {"q": rows} | _by_row(of_heads, spec), spec=spec, interpret=interpret)
        first = (tile[:, None] * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)) * spec.rows + row[:, None]
        at = first[:, :, None] + jnp.arange(group, dtype=jnp.int32)  # [T, K, G]
        chunk = rows.reshape(-1, head_dim)[at].astype(q.dtype)
        out = jnp.where((lengths[sequence] == 1)[:, None, None, None], out, chunk)
    out = jnp.where(in_a_chunk[:, None, None, None], out, jnp.zeros((), q.dtype))
    return out.reshape(q.shape), k_cache, v_cache


def _by_row(of_heads: dict[str, jax.Array], spec: Spec) -> dict[str, jax.Array]:
    """[H] -> [K, GRANULE + rows]: the number of each row's head, where the first head is that of row GRANULE."""
    head = jnp.arange(-GRANULE, spec.rows, dtype=jnp.int32) % spec.group
    return {name: x.reshape(-1, spec.group)[:, head] for name, x in of_heads.items()}


def _first_key(position: jax.Array, window: jax.Array, spec: Spec) -> jax.Array:
    """Where a query's keys begin: before its window by less than what one copy fetches."""
    unit = min(spec.keys, spec.block_size)
    return jnp.maximum(position - window + 1, 0) // unit * unit


def _work_list(active: jax.Array, columns: list[jax.Array]) -> jax.Array:
    columns = [jnp.broadcast_to(column, active.shape) for column in columns]
    assert len(columns) == NUM_COLUMNS
    work = jnp.where(active[:, None], jnp.stack(columns, axis=1), 0)
    count = jnp.full((1, NUM_COLUMNS), jnp.sum(active, dtype=jnp.int32))
    return jnp.concatenate([work, count])


def plan_pieces(
    query_starts: jax.Array, context_lens: jax.Array, first_block: jax.Array, window: jax.Array, *,
    num_kv_heads: int, tiles: GpuTiles, spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array, int]:  # fmt: skip
    """Cuts the contexts of single queries into pieces of about the same size, as many as keep the device busy.

    Returns:
      the work list; the first piece of each sequence and the number of its pieces, i32[S]; the most that one can have.
    """
    num_sequences = context_lens.shape[0]
    wanted = max(1, tiles.pieces // num_kv_heads)
    # What the results of a sequence are combined from is bounded, so that it can be gathered.
    most = max(1, min(wanted, max(8, 1024 // num_sequences)))
    lengths = query_starts[1:] - query_starts[:-1]
    first = _first_key(context_lens - 1, window, spec)
    steps = jnp.where((lengths == 1) & (context_lens > 0), -(-(context_lens - first) // spec.keys), 0)
    share = jnp.maximum(max(1, tiles.min_piece // spec.keys), -(-jnp.sum(steps, dtype=jnp.int32) // wanted))
    share = jnp.maximum(share, -(-steps // most))  # steps of a piece, i32[S]
    pieces = -(-steps // share)
    share = -(-steps // jnp.maximum(pieces, 1))  # pieces of a sequence are of one size
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    starts = ends - pieces

    i = jnp.arange(wanted + num_sequences, dtype=jnp.int32)
    s = jnp.minimum(jnp.sum(ends[None, :] <= i[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    piece = i - starts[s]
    begin = first[s] + piece * share[s] * spec.keys
    end = jnp.minimum(begin + share[s] * spec.keys, context_lens[s])
    work = _work_list(
        i < ends[-1],
        [s, query_starts[s] * spec.group, context_lens[s] - 1, begin, end, window, first_block,
         (piece == 0).astype(jnp.int32)],
    )  # fmt: skip
    return work, starts, pieces, most


def plan_chunks(
    query_starts: jax.Array, context_lens: jax.Array, first_block: jax.Array, window: jax.Array, *,
    num_tokens: int, sequence: jax.Array, spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cuts chunks of several tokens into tiles of queries; the later ones of a chunk, which see more keys, come first.

    Returns:
      the work list; for each token its tile and the row of its first head in it, i32[T].
    """
    num_sequences = context_lens.shape[0]
    queries = spec.queries
    lengths = query_starts[1:] - query_starts[:-1]
    tiles = jnp.where(lengths > 1, -(-lengths // queries), 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    starts = ends - tiles

    i = jnp.arange(max(1, num_tokens // queries + min(num_sequences, num_tokens // 2)), dtype=jnp.int32)
    j = ends[-1] - 1 - i
    s = jnp.minimum(jnp.sum(ends[None, :] <= j[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    query = (j - starts[s]) * queries  # the tile's first one, counted in its chunk
    position = context_lens[s] - lengths[s] + query
    end = position + jnp.minimum(lengths[s] - query, queries)
    work = _work_list(
        j >= 0,
        [s, (query_starts[s] + query) * spec.group, position, _first_key(position, window, spec), end, window,
         first_block, jnp.ones_like(s)],
    )  # fmt: skip
    query = jnp.arange(num_tokens, dtype=jnp.int32) - query_starts[sequence]
    tile = jnp.maximum(ends[-1] - 1 - starts[sequence] - query // queries, 0)
    row = query % queries * spec.group
    # The tile begins at a granule, which may lie before its first query.
    skipped = (jnp.arange(num_tokens, dtype=jnp.int32) * spec.group - row) % GRANULE
    return work, tile, row + skipped


def launch(work: jax.Array, operands: dict[str, jax.Array], *, spec: Spec, interpret: Any) -> Any:
    """The results of all tiles, [tiles, K, rows, D], and with `spec.partial` their log2-sum-exp, f32[tiles, K, rows]."""
    num_tiles, num_kv_heads = work.shape[0] - 1, operands["k_cache"].shape[1]
    spec = dataclasses.replace(spec, blocks=min(spec.blocks, num_tiles * num_kv_heads))
    names = ["work", *operands, "out"]
    shape = (num_tiles, num_kv_heads, spec.rows_out)
    out: Any = jax.ShapeDtypeStruct((*shape, spec.head_dim), jnp.float32 if spec.partial else spec.dtype)
    if spec.partial:
        names.append("lse")
        out = (out, jax.ShapeDtypeStruct(shape, jnp.float32))

    def kernel(*refs: Any) -> None:
        attend_tiles(dict(zip(names, refs, strict=True)), spec)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(spec.blocks,),
        grid_names=("block",),
        num_threads=spec.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret or None,
        kernel_name="ragged_attention_pieces" if spec.partial else "ragged_attention_chunks",
    )(work, *operands.values())


def combine(
    partial: jax.Array, lse: jax.Array, starts: jax.Array, pieces: jax.Array, *, most: int
) -> jax.Array:
    """Softmax-weighted sums over the pieces of each sequence, f32[S, K, G, D]; 0 where there is none.

    Args:
      partial: f32[tiles, K, G, D], each normalised over its own keys.
      lse: f32[tiles, K, G], log2 of the sum of exp2 of its scores.
      starts, pieces: i32[S], the first piece of a sequence and how many it has, at most `most`.
    """
    j = jnp.arange(most, dtype=jnp.int32)
    exists = (j < pieces[:, None])[:, :, None, None]  # [S, J, 1, 1]
    at = jnp.minimum(starts[:, None] + jnp.minimum(j, pieces[:, None] - 1), partial.shape[0] - 1)
    at = jnp.maximum(at, 0)
    scores = jnp.where(exists, lse[at], -jnp.inf)  # [S, J, K, G]
    top = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.where(exists, jnp.exp2(scores - top), 0.0)
    total = jnp.sum(weights, axis=1)
    # Select: where no tile ran, memory may hold NaN.
    values = jnp.where(exists[..., None], partial[at], 0.0)
    result = jnp.sum(weights[..., None] * values, axis=1)
    return result / jnp.where(total == 0.0, 1.0, total)[..., None]
