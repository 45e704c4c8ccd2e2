"""Ragged attention on a GPU: the step's keys and values are written in place, and a Mosaic-GPU kernel computes attention.

The kernel runs twice: over tiles of several queries, and over pieces of the contexts of single queries, whose partial
results are then combined. `hopper.py`, `hopper_wide.py` and `ampere.py` define its body for each GPU generation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_target, jax_versions
from pallas_kernels.pallas_types import Ref
from pallas_kernels.ragged_attention.arguments import CacheLayer, Latents, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.gpu import ampere, hopper, hopper_wide, merge, support, write
from pallas_kernels.ragged_attention.gpu.plan import GpuPlan, combine, most_pieces, plan_step, stack_plans
from pallas_kernels.ragged_attention.gpu.softmax_tile import GRANULE, KIND, Spec, of_layer
from pallas_kernels.ragged_attention.gpu.tile_sizes import GpuTiles, choose
from pallas_kernels.ragged_attention.measured_tiles import Shape
from pallas_kernels.ragged_attention.packed import is_packed
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache
from pallas_kernels.ragged_attention.rotation import rotated
from pallas_kernels.ragged_attention.xla import write_kv

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["plan_gpu", "ragged_attention_gpu", "stack_plans"]

BODIES = {"hopper": hopper, "ampere": ampere}
NO_WINDOW = 2**30  # far beyond any context, and position - window stays in int32


def ragged_attention_gpu(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
    *,
    tiles: GpuTiles | None = None,
    generation: str | None = None,
    interpret: object = False,
) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
    """See `pallas_kernels.ragged_attention.ragged_attention`.

    q is rounded to the dtype of the caches, or to bfloat16 if they have 8 bits. `generation` is "hopper" or "ampere"; None
    means the generation of the target GPU, or Hopper if there is no GPU. If `tiles` is None, measured or modeled tiles are
    used. `interpret` is passed to `plgpu.kernel`. Raises ValueError if `support.unsupported` returns a reason.
    """
    num_tokens, num_heads, head_dim = q.shape
    call = _Call.of(
        k_cache,
        index,
        scoring,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_blocks=layer.num_blocks,
        tiles=tiles,
        generation=generation,
        interpreted=bool(interpret),
    )
    plan = index.plans.gpu if index.plans is not None else None
    if plan is None:
        plan = call.plan(index, scoring)
    group, num_kv_heads, dtype = call.group, call.num_kv_heads, call.pieces.dtype
    # Rows of the G heads of a KV head are adjacent. Both kernels read these rows; a tile may extend past T.
    num_rows = num_tokens * group + max(call.pieces.rows_in, call.chunks.rows_in) + -(num_tokens * group) % GRANULE
    assert not is_packed(v_cache, scoring), "they are refused before"
    numbers = _numbers(layer, plan, scoring)
    can_rotate = jax_versions.too_old(jax_versions.WRITE_KERNEL) is None
    has_values = v_cache is not None
    is_plain = not isinstance(k_cache, QuantizedCache)
    if scoring.rotation is not None and can_rotate and call.pieces.parts == 1 and is_plain and has_values:
        assert not isinstance(v_cache, QuantizedCache), "both caches have one dtype"
        queries, k_cache, v_cache = write.rotate_and_write(
            q,
            k,
            v,
            scoring.rotation,
            k_cache,
            v_cache,
            kv_slots=index.kv_slots if plan.slots is None else plan.slots,
            numbers=numbers,
            num_blocks=layer.num_blocks,
            num_rows=num_rows,
            dtype=dtype,
            most_numbers=head_dim // 2 if interpret else write.MOST_NUMBERS,
            interpret=interpret,
        )
    else:
        q, k, scoring = rotated(q, k, scoring)
        k_cache, v_cache = write_kv(k, v, k_cache, v_cache, kv_slots=index.kv_slots, layer=layer)
        queries = q.reshape(num_tokens, num_kv_heads, group, head_dim).astype(dtype).swapaxes(0, 1)
        queries = queries.reshape(num_kv_heads, num_tokens * group, head_dim)
        queries = jnp.pad(queries, ((0, 0), (0, num_rows - num_tokens * group), (0, 0)))
    queries = queries[..., : call.pieces.head_dim]

    operands = {"tables": index.block_tables if plan.tables is None else plan.tables, "numbers": numbers}
    of_values = k_cache if v_cache is None else v_cache
    for name, cache in (("k", k_cache), *([] if call.pieces.values_in_keys else [("v", of_values)])):
        if isinstance(cache, QuantizedCache):
            operands |= {f"{name}_cache": cache.values, f"{name}_scales": cache.scales}
        else:
            operands[f"{name}_cache"] = cache
    given = (scoring.alibi_slopes, scoring.sinks)
    rows_of_both = max(call.pieces.rows, call.chunks.rows)
    of_heads = {n: _by_row(x, group, rows_of_both) for n, x in zip(("slopes", "sinks"), given, strict=True) if x is not None}

    def launch_tiles(work: jax.Array, rows: jax.Array, spec: Spec) -> Sequence[jax.Array]:
        return launch(call.body, work, operands | {"q": rows} | of_heads, spec=spec, interpret=interpret)

    partial, lse = launch_tiles(plan.pieces, queries, call.pieces)
    rows = None if plan.chunks is None else launch_tiles(plan.chunks, queries, call.chunks)[0]  # [tiles, K, R, D]

    def of_heads_of(out: jax.Array) -> jax.Array:
        out = out.reshape(*q.shape[:2], call.pieces.value_dim)
        return jnp.pad(out, ((0, 0), (0, 0), (0, head_dim - call.pieces.value_dim)))

    if merge.supports(group, call.pieces.value_dim, interpreted=bool(interpret)):
        blocks = call.tiles.blocks * merge.BLOCKS
        out = merge.merge(
            partial, lse, rows, plan.merge, numbers, group=group, dtype=q.dtype, blocks=blocks, interpret=interpret
        )
        return of_heads_of(out), k_cache, v_cache
    most = most_pieces(index.block_tables.shape[0], num_kv_heads, call.tiles)
    first_row = index.query_starts[:-1] * group % GRANULE
    plan = plan.alone()
    single = combine(partial, lse, plan.first_piece, plan.num_pieces, first_row, group=group, most=most)
    out = single[plan.sequence].astype(q.dtype)  # [T, K, G, D]
    if rows is not None and plan.tile is not None and plan.row is not None:
        head = jnp.arange(num_kv_heads, dtype=jnp.int32)[None, :]
        first = (plan.tile[:, None] * num_kv_heads + head) * call.chunks.rows + plan.row[:, None]
        at = first[:, :, None] + jnp.arange(group, dtype=jnp.int32)[None, None, :]  # [T, K, G]
        chunk = rows.reshape(-1, call.pieces.value_dim)[at].astype(q.dtype)
        out = jnp.where(plan.is_single[:, None, None, None], out, chunk)
    out = jnp.where(plan.is_used[:, None, None, None], out, jnp.zeros((), q.dtype))
    return of_heads_of(out), k_cache, v_cache


def plan_gpu(
    k_cache: Cache,
    index: RaggedIndex,
    window: int | jax.Array | None,
    *,
    num_tokens: int,
    num_heads: int,
    num_blocks: int,
    independent: bool = False,
    latents: Latents | None = None,
    tiles: GpuTiles | None = None,
    generation: str | None = None,
) -> GpuPlan:
    """What `ragged_attention_gpu` otherwise computes in every such call; only the shape of k_cache is read.

    `independent` as for `plan_pieces`, `tiles` and `generation` as for `ragged_attention_gpu`.
    """
    scoring = Scoring(scale=1.0, sliding_window=window, latents=latents)
    call = _Call.of(
        k_cache,
        index,
        scoring,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_blocks=num_blocks,
        tiles=tiles,
        generation=generation,
    )
    return call.plan(index, scoring, independent=independent)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static properties of both kernels of a call."""

    body: ModuleType
    tiles: GpuTiles
    pieces: Spec
    chunks: Spec
    num_tokens: int
    num_kv_heads: int  # as the kernels see them: with the `parts` of each

    @property
    def group(self) -> int:
        return self.pieces.group

    @staticmethod
    def of(
        k_cache: Cache,
        index: RaggedIndex,
        scoring: Scoring,
        *,
        num_tokens: int,
        num_heads: int,
        num_blocks: int,
        tiles: GpuTiles | None = None,
        generation: str | None = None,
        interpreted: bool = False,
    ) -> _Call:
        """Raises ValueError if `support.unsupported` returns a reason."""
        _, num_kv_heads, block_size, head_dim = k_cache.shape
        latents = scoring.latents if head_dim > support.MAX_HEAD_DIM else None
        generation = generation or gpu_target.generation() or "hopper"
        reason = support.unsupported(k_cache, num_heads, generation, latents=scoring.latents, interpreted=interpreted)
        if reason:
            raise ValueError(f"implementation='gpu' {reason}, or use implementation='xla'")
        group, parts = num_heads // num_kv_heads, 1
        is_wide = head_dim > support.MAX_HEAD_DIM
        body = hopper_wide if is_wide and generation == "hopper" else BODIES[generation]
        if is_wide and (divided := support.parts_of(group, generation)):
            group, parts = group // divided, divided
        if tiles is None:
            shape = Shape(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                block_size=block_size,
                num_tokens=num_tokens,
                num_sequences=index.block_tables.shape[0],
                dtype=jnp.dtype(k_cache.dtype).name,
            )
            tiles = choose(shape, generation, latents=latents)
        # 8-bit numbers are multiplied as bfloat16.
        dtype = jnp.dtype(jnp.bfloat16) if isinstance(k_cache, QuantizedCache) else k_cache.dtype

        def spec_for(*, partial: bool, keys: int, stages: int) -> Spec:
            rows_in, rows, rows_out = body.tile_rows(group, head_dim, partial=partial)
            return Spec(
                group=group,
                head_dim=head_dim if latents is None else latents.key_dim,
                value_dim=head_dim if latents is None else latents.value_dim,
                parts=parts,
                values_in_keys=latents is not None,
                block_size=block_size,
                rows=rows,
                rows_in=rows_in,
                rows_out=rows_out,
                keys=keys,
                stages=stages,
                blocks=tiles.blocks,
                num_blocks=num_blocks,
                scale=scoring.scale,
                soft_cap=scoring.soft_cap,
                has_window=scoring.sliding_window is not None,
                partial=partial,
                dtype=dtype,
                cache_dtype=k_cache.dtype,
                interpreted=interpreted,
            )

        return _Call(
            body=body,
            tiles=tiles,
            pieces=spec_for(partial=True, keys=tiles.single_keys, stages=tiles.single_stages),
            chunks=spec_for(partial=False, keys=tiles.chunk_keys, stages=tiles.chunk_stages),
            num_tokens=num_tokens,
            num_kv_heads=num_kv_heads * parts,
        )

    def plan(self, index: RaggedIndex, scoring: Scoring, *, independent: bool = False) -> GpuPlan:
        window = NO_WINDOW if scoring.sliding_window is None else jnp.minimum(scoring.sliding_window, NO_WINDOW)
        return plan_step(
            index,
            jnp.asarray(window, jnp.int32),
            num_tokens=self.num_tokens,
            num_kv_heads=self.num_kv_heads,
            tiles=self.tiles,
            specs=(self.pieces, self.chunks),
            independent=independent,
        )


def _numbers(layer: CacheLayer, plan: GpuPlan, scoring: Scoring) -> Int[Array, " numbers"]:
    """What kernels are told of a layer; see `softmax_tile.LAYER`."""
    number = jnp.asarray(layer.number, jnp.int32)
    if plan.kind is None and scoring.rotation_row is None:
        return number.reshape(1)
    return jnp.stack([number, *(jnp.int32(0) if row is None else row for row in (plan.kind, scoring.rotation_row))])


def _by_row(x: Float[Array, " H"], group: int, rows: int) -> Float[Array, "K _"]:
    """[K, GRANULE + rows]: the value of each row's head, with the first head at row GRANULE."""
    return x.reshape(-1, group)[:, jnp.arange(-GRANULE, rows, dtype=jnp.int32) % group]


def launch(
    body: ModuleType, work: jax.Array, operands: dict[str, jax.Array], *, spec: Spec, interpret: object
) -> Sequence[jax.Array]:
    """The results of all tiles, [tiles, K, rows, D], and with `spec.partial` their log2-sum-exp, f32[tiles, K, rows]."""
    num_tiles, num_kv_heads = work.shape[-2] - 1, operands["k_cache"].shape[1] * spec.parts
    spec = dataclasses.replace(spec, blocks=min(spec.blocks, num_tiles * num_kv_heads))
    names = ["work", *operands, "out"]
    shape = (num_tiles, num_kv_heads, spec.rows_out)
    results = [jax.ShapeDtypeStruct((*shape, spec.value_dim), jnp.float32 if spec.partial else spec.dtype)]
    if spec.partial:
        names.append("lse")
        results.append(jax.ShapeDtypeStruct(shape, jnp.float32))

    def kernel(*refs: Ref) -> None:
        given = dict(zip(names, refs, strict=True))
        body.attend_tiles(given | {name: of_layer(given, name, KIND, 2) for name in ("work", "tables")}, spec)

    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=(spec.blocks,),
        grid_names=("block",),
        num_threads=body.num_threads(spec),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret or None,
        kernel_name="ragged_attention_pieces" if spec.partial else "ragged_attention_chunks",
    )(work, *operands.values())
