"""Ragged attention on a TPU: one kernel writes the step's keys and values, and another computes attention."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pallas_types import Ref, Scratch
from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention.arguments import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.packed import is_packed, pack
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache
from pallas_kernels.ragged_attention.tpu import tile_sizes
from pallas_kernels.ragged_attention.tpu.copies import NO_WINDOW, TABLE_PIECE, Refs, Spec
from pallas_kernels.ragged_attention.tpu.kernel import attend_tiles
from pallas_kernels.ragged_attention.tpu.support import LANES, MAX_TABLE_WORDS, unsupported
from pallas_kernels.ragged_attention.tpu.tile_sizes import Tiles
from pallas_kernels.ragged_attention.tpu.write import Granules, granules_of, write_kv_tpu
from pallas_kernels.ragged_attention.tpu.write_quantized import write_kv_quantized_tpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def ragged_attention_tpu(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
    *,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
    """See `pallas_kernels.ragged_attention.ragged_attention`.

    If `tiles` is None, the tiles of the target device are used. `interpret` is passed to `pl.pallas_call`.
    Raises ValueError if `unsupported` returns a reason.
    """
    reason = unsupported(k_cache, index.block_tables.shape[1], interpreted=bool(interpret))
    if reason:
        raise ValueError(f"implementation='tpu' {reason}, or use implementation='xla'")
    num_tokens, num_heads, head_dim = q.shape
    packed = is_packed(v_cache, scoring)
    new, caches = [k, v], [k_cache, v_cache]
    if packed:
        q, new, caches = pack(q, jnp.zeros_like(q)), [pack(k, v)], [k_cache]
    elif v_cache is None:
        new, caches = [k], [k_cache]
    write: Any = write_kv_tpu  # the types do not say that both caches are of one form
    product_dtype = k_cache.dtype
    if isinstance(k_cache, QuantizedCache):
        # 8-bit numbers are exact in bfloat16, which the MXU multiplies.
        write, product_dtype = write_kv_quantized_tpu, q.dtype if q.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    shape = _shape(k_cache, index, num_tokens=num_tokens, num_heads=num_heads, packed=packed)
    tiles = tiles or tile_sizes.choose(shape)
    spec = _spec(
        shape, tiles, index, scoring, product_dtype=product_dtype, zero_values=k_cache.dtype != jnp.int8, packed=packed
    )
    plan = index.plans.tpu if index.plans is not None else None
    if plan is None:
        plan = _plan(k_cache, index, spec, num_tokens=num_tokens, num_blocks=layer.num_blocks)
    window = NO_WINDOW if scoring.sliding_window is None else scoring.sliding_window
    # One array for both kernels, since it is made in every layer.
    of_plan = (plan.granules.number, plan.num_single_tiles, plan.num_tiles)
    numbers = (layer.first_block, *of_plan, window, plan.first_used, plan.end_used)
    scalars = jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers])
    written = write(new, caches, scalars, granules=plan.granules, interpret=interpret)
    k_cache, v_cache = written[0], None if v_cache is None else written[1]
    out = _attend(
        scalars,
        plan.members,
        q,
        k_cache,
        v_cache,
        plan.tables,
        slopes=_by_kv_head(scoring.alibi_slopes, spec),
        sinks=_by_kv_head(scoring.sinks, spec),
        spec=spec,
        tiles=tiles,
        interpret=interpret,
    )
    out = out[..., head_dim:] if packed else out
    return out, k_cache, v_cache


@pytree
class TpuPlan:
    """What is the same in all layers: the granules that are written, and the tiles."""

    granules: Granules
    members: Int[Array, "4 members"]
    """See `plan_tiles`."""
    num_single_tiles: Int[Array, ""]
    num_tiles: Int[Array, ""]
    tables: Int[Array, "S W 1 P"]
    """The block tables in pieces of `TABLE_PIECE`."""
    first_used: Int[Array, ""]
    end_used: Int[Array, ""]
    """The tokens from `first_used` to here belong to chunks; the results of others are zero."""


def plan_tpu(
    k_cache: Cache,
    index: RaggedIndex,
    first: TpuPlan | None = None,
    /,
    *,
    num_tokens: int,
    num_heads: int,
    num_blocks: int,
    packed: bool = False,
) -> TpuPlan:
    """What `ragged_attention_tpu` otherwise computes in every such call; only the shape of k_cache is read.

    `packed`: whether the cache holds keys and values in one row.
    `first` is the plan for an index with the same chunks, but with other blocks and contexts.
    """
    shape = _shape(k_cache, index, num_tokens=num_tokens, num_heads=num_heads, packed=packed)
    spec = _spec(
        shape,
        tile_sizes.choose(shape),
        index,
        Scoring(scale=1.0),
        product_dtype=k_cache.dtype,
        zero_values=True,
        packed=packed,
    )
    plan = _plan(k_cache, index, spec, num_tokens=num_tokens, num_blocks=num_blocks)
    if first is None:
        return plan
    # The same arrays for all layers are not looked up by layer.
    return dataclasses.replace(first, granules=plan.granules, members=plan.members, tables=plan.tables)


def _plan(k_cache: Cache, index: RaggedIndex, spec: Spec, *, num_tokens: int, num_blocks: int) -> TpuPlan:
    query_starts, (num_sequences, max_blocks) = index.query_starts, index.block_tables.shape
    members, num_single_tiles, num_tiles = plan_tiles(query_starts, index.context_lens, num_tokens=num_tokens, spec=spec)
    tables = jnp.pad(index.block_tables, ((0, 0), (0, -max_blocks % TABLE_PIECE)))
    return TpuPlan(
        granules=granules_of(index.kv_slots, k_cache, num_blocks=num_blocks),
        members=members,
        num_single_tiles=num_single_tiles,
        num_tiles=num_tiles,
        tables=tables.reshape(num_sequences, -1, 1, TABLE_PIECE),
        first_used=query_starts[0],
        end_used=query_starts[-1],
    )


def _shape(k_cache: Cache, index: RaggedIndex, *, num_tokens: int, num_heads: int, packed: bool) -> tile_sizes.Shape:
    _, num_kv_heads, block_size, width = k_cache.shape
    return tile_sizes.Shape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // 2 if packed else width,
        block_size=block_size,
        num_tokens=num_tokens,
        num_sequences=index.block_tables.shape[0],
        dtype=k_cache.dtype.name,
    )


def _spec(
    shape: tile_sizes.Shape,
    tiles: Tiles,
    index: RaggedIndex,
    scoring: Scoring,
    *,
    product_dtype: np.dtype,
    zero_values: bool,
    packed: bool,
) -> Spec:
    num_sequences, max_blocks = index.block_tables.shape
    width = -(-max_blocks // TABLE_PIECE)
    sequences = tiles.sequences
    while sequences > 1 and 2 * sequences * width * TABLE_PIECE > MAX_TABLE_WORDS:
        sequences //= 2
    share = max(1, tiles.keys // (sequences * shape.block_size))
    return Spec(
        num_kv_heads=shape.num_kv_heads,
        group=shape.num_heads // shape.num_kv_heads,
        width=2 * shape.head_dim if packed else shape.head_dim,
        packed=packed,
        block_size=shape.block_size,
        piece=sequences * max(share, -(-LANES // shape.block_size)),
        sequences=sequences,
        queries=tiles.queries,
        max_single_tiles=-(-num_sequences // sequences),
        has_chunks=shape.num_tokens > 1,
        has_window=scoring.sliding_window is not None,
        cores=tiles.cores,
        scale=scoring.scale,
        soft_cap=scoring.soft_cap,
        # The MXU multiplies bfloat16; full float32 precision takes several passes.
        precision=lax.Precision.HIGHEST if product_dtype == jnp.float32 else lax.Precision.DEFAULT,
        product_dtype=product_dtype,
        zero_values=zero_values,
    )


def plan_tiles(
    query_starts: Int[Array, " starts"], context_lens: Int[Array, " S"], *, num_tokens: int, spec: Spec
) -> tuple[Int[Array, "4 members"], Int[Array, ""], Int[Array, ""]]:
    """Assigns chunks to tiles: J single queries per tile, by descending context; longer chunks, Q queries per tile.

    Returns:
      sequence, token, position and count of each member, i32[4, tiles * J] (see `Refs`), with entries for the maximum
      number of single tiles before the chunk tiles; the number of single tiles; the number of tiles.
    """
    num_sequences = context_lens.shape[0]
    lengths = query_starts[1:] - query_starts[:-1]
    j, q = spec.sequences, spec.queries

    single = (lengths == 1) & (context_lens > 0)
    # A tile takes as long as its longest sequence, so sequences of similar length are grouped.
    order = jnp.argsort(jnp.where(single, -context_lens, 1)).astype(jnp.int32)
    order = jnp.pad(order, (0, spec.max_single_tiles * j - num_sequences))
    used = jnp.arange(order.shape[0], dtype=jnp.int32) < jnp.sum(single)
    members = [order, query_starts[order], context_lens[order] - 1, jnp.ones_like(order)]
    members = [jnp.where(used, x, 0) for x in members]
    num_single_tiles = (jnp.sum(single, dtype=jnp.int32) + j - 1) // j

    tiles = jnp.where(lengths > 1, (lengths + q - 1) // q, 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    max_chunk_tiles = max(1, num_tokens // q + min(num_sequences, num_tokens // 2))
    i = jnp.arange(max_chunk_tiles, dtype=jnp.int32)
    s = jnp.minimum(jnp.sum(ends[None, :] <= i[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    first = (i - (ends[s] - tiles[s])) * q
    chunk = [s, query_starts[s] + first, context_lens[s] - lengths[s] + first, jnp.clip(lengths[s] - first, 0, q)]
    work = [jnp.concatenate([a, jnp.repeat(b, j)]) for a, b in zip(members, chunk, strict=True)]
    return jnp.stack(work), num_single_tiles, num_single_tiles + ends[-1]


def _by_kv_head(of_head: jax.Array | None, spec: Spec) -> jax.Array | None:
    """[H] -> [K, Gp, LANES], with each value repeated in all lanes."""
    if of_head is None:
        return None
    rows = of_head.reshape(spec.num_kv_heads, spec.group)
    rows = jnp.pad(rows, ((0, 0), (0, spec.padded_group - spec.group)))
    return jnp.broadcast_to(rows[:, :, None], (*rows.shape, LANES))


def _attend(
    scalars: jax.Array,
    members: jax.Array,
    q: jax.Array,
    k_cache: Cache,
    v_cache: Cache | None,
    tables: jax.Array,
    *,
    slopes: jax.Array | None,
    sinks: jax.Array | None,
    spec: Spec,
    tiles: Tiles,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    _, num_heads, width = q.shape
    rows = max(spec.queries, spec.sequences) if spec.has_chunks else spec.sequences
    singles = (spec.sequences * spec.num_kv_heads, spec.padded_group)
    chunk = (num_heads, spec.queries)
    f32 = jnp.float32
    buffer = pltpu.VMEM((2, spec.piece, *k_cache.shape[1:]), k_cache.dtype)
    both: dict[str, Any] = {"k": k_cache} if v_cache is None else {"k": k_cache, "v": v_cache}
    caches: dict[str, Any] = {f"{name}_cache": cache for name, cache in both.items()}
    scale_buffers: dict[str, Scratch] = {}
    if isinstance(k_cache, QuantizedCache):
        scales = {f"{name}_scales": cache.scales for name, cache in both.items()}
        caches = {f"{name}_cache": cache.values for name, cache in both.items()} | scales
        scale_buffer = pltpu.VMEM((2, spec.piece, *k_cache.scales.shape[1:]), f32)
        scale_buffers = {f"{name}_scale_buffer": scale_buffer for name in both}
    scratch: dict[str, Scratch] = {
        "table_buffer": pltpu.SMEM((2, spec.sequences, *tables.shape[1:]), jnp.int32),
        "q_buffer": pltpu.VMEM((rows, num_heads, width), q.dtype),
        **{f"{name}_buffer": buffer for name in both},
        **scale_buffers,
        "out_buffer": pltpu.VMEM((rows, num_heads, width), q.dtype),
        "q_single": pltpu.VMEM((*singles, width), f32),
        "top_single": pltpu.VMEM((*singles, LANES), f32),
        "total_single": pltpu.VMEM((*singles, LANES), f32),
        "acc_single": pltpu.VMEM((*singles, width), f32),
        "table_sem": pltpu.SemaphoreType.DMA((2,)),
        "kv_sem": pltpu.SemaphoreType.DMA((2,)),
        "q_sem": pltpu.SemaphoreType.DMA((1,)),
        "out_sem": pltpu.SemaphoreType.DMA((1,)),
    }
    if spec.has_chunks:
        scratch |= {
            "q_chunk": pltpu.VMEM((*chunk, width), spec.product_dtype),
            "top_chunk": pltpu.VMEM((*chunk, LANES), f32),
            "total_chunk": pltpu.VMEM((*chunk, LANES), f32),
            "acc_chunk": pltpu.VMEM((*chunk, width), f32),
        }
    optional = {name: array for name, array in (("slopes", slopes), ("sinks", sinks)) if array is not None}
    names = ["q", *caches, "tables", *optional, "out"]
    none = dict.fromkeys(
        (
            "v_cache",
            "k_scales",
            "v_scales",
            "v_buffer",
            "k_scale_buffer",
            "v_scale_buffer",
            "slopes",
            "sinks",
            "q_chunk",
            "top_chunk",
            "total_chunk",
            "acc_chunk",
        )
    )

    def kernel(scalars: Ref, members: Ref, *refs: Ref) -> None:
        columns = {name: members.at[row] for row, name in enumerate(("sequence", "token", "position", "count"))}
        named = none | columns | dict(zip([*names, *scratch], refs, strict=True))
        attend_tiles(Refs(scalars=scalars, **named), spec)

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(spec.cores,),
            in_specs=[hbm] * (2 + len(caches)) + [vmem] * len(optional),
            out_specs=hbm,
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=tiles.vmem_limit,
            disable_bounds_checks=True,  # checks would cost twenty scalar instructions per fetched block
        ),
        cost_estimate=_cost(q, k_cache, tables, spec, num_caches=len(both)),
        interpret=interpret,
        name="ragged_attention",
    )(scalars, members, q, *caches.values(), tables, *optional.values())


def _cost(q: jax.Array, k_cache: Cache, tables: jax.Array, spec: Spec, *, num_caches: int) -> pl.CostEstimate:
    """Cost estimate for XLA's scheduler: half the cost of full block tables, because the contexts are not known here."""
    num_tokens, num_heads, width = q.shape
    keys = tables.shape[1] * TABLE_PIECE * spec.block_size // 2
    tiles = tables.shape[0] + num_tokens // spec.queries
    return pl.CostEstimate(
        flops=4 * num_tokens * num_heads * width * keys,
        transcendentals=num_tokens * num_heads * keys,
        bytes_accessed=num_caches * tiles * keys * spec.num_kv_heads * width * k_cache.dtype.itemsize,
    )
