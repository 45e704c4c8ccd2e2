"""Collects the results of both attention kernels, one row per token and head, in one launch.

The pieces of a single query's context are combined in their order, so that the same batch gives the same bits. XLA would
launch three kernels for it, and write the pieces' weights to memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

from pallas_kernels import jax_versions
from pallas_kernels.pallas_types import Layout, Ref
from pallas_kernels.ragged_attention.gpu.plan import CHUNK, FIRST_HEAD, PLACE, SINGLE, TILE, TILES, UNUSED
from pallas_kernels.ragged_attention.gpu.softmax_tile import KIND, NO_KEY, of_layer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of its functions
THREADS = 128
BLOCKS = 8  # times those of the attention kernels, which need more registers and shared memory
MOST_NUMBERS = 1024  # per step of a thread block: eight in a thread, and as many weights


def supports(group: int, head_dim: int, *, interpreted: bool) -> bool:
    """Whether this jax can compile the kernel, and some of the heads of a KV head are a multiple of 128 numbers."""
    is_new = interpreted or jax_versions.too_old(jax_versions.MERGE_KERNEL) is None
    return is_new and _heads_per_step(group, head_dim) > 0


def _heads_per_step(group: int, head_dim: int) -> int:
    """The most heads that a thread block merges at the same time; 0 if there is no such number."""
    fewest = THREADS // math.gcd(THREADS, head_dim)
    most = max(fewest, MOST_NUMBERS // head_dim // fewest * fewest)
    return min(most, group // fewest * fewest)


def merge(
    partial: Float[Array, "pieces K R D"],
    lse: Float[Array, "pieces K R"],
    chunks: Float[Array, "tiles K rows D"] | None,
    places: Int[Array, "*kinds T columns"],
    numbers: Int[Array, " numbers"],
    *,
    group: int,
    dtype: DTypeLike,
    blocks: int,
    interpret: object = False,
) -> Float[Array, "T H D"]:
    """The result of every token; 0 if it belongs to no chunk.

    Args:
      partial, lse: the results of pieces of contexts, and their log2-sum-exp. Others may be uninitialized.
      chunks: the results of chunk tiles; None: there are none.
      places: `GpuPlan.merge`.
      numbers: of the layer; see `softmax_tile.LAYER`.
      group: G, query heads per KV head.
      dtype: of the result.
      blocks: how many thread blocks share the tokens and heads.
      interpret: passed to `plgpu.kernel`.
    """
    num_tokens, num_kv_heads, head_dim = places.shape[-2], partial.shape[1], partial.shape[-1]
    num_pairs = num_tokens * num_kv_heads
    blocks = min(blocks, num_pairs)
    heads = _heads_per_step(group, head_dim)
    vector = next(n for n in (4, 2, 1) if heads * head_dim % (THREADS * n) == 0 and head_dim % n == 0)
    layout = None if interpret else plgpu.Layout.WG_STRIDED((heads, head_dim), vec_size=vector)
    names = ["places", "numbers", "partial", "lse", *(["chunks"] if chunks is not None else []), "out"]

    def kernel(*all_refs: Ref) -> None:
        refs = dict(zip(names, all_refs, strict=True))
        refs["places"] = of_layer(refs, "places", KIND, 2)

        def pair(i: jax.Array, _: None) -> None:
            ordinal = lax.axis_index("block") + i * blocks
            token = lax.div(ordinal, jnp.int32(num_kv_heads))
            place = _Place(token=token, head=ordinal - token * num_kv_heads, group=group, heads=heads, layout=layout)
            _merge_head(refs, place)

        mine = lax.div(num_pairs - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))
        lax.fori_loop(0, mine, pair, None)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_kv_heads * group, head_dim), dtype),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
        kernel_name="ragged_attention_merge",
    )(places, numbers, partial, lse, *([chunks] if chunks is not None else []))


class _Place(NamedTuple):
    """A token and a KV head, and how their results are divided."""

    token: jax.Array
    head: jax.Array
    group: int
    heads: int  # of the group that are merged at the same time
    layout: Layout  # of their numbers in registers; None in the interpreter


def _merge_head(refs: dict[str, Ref], of: _Place) -> None:
    """Writes the results of one token and KV head."""
    token, head, group, heads, layout = of
    place, tile, tiles, first_row = (refs["places"][token, column] for column in (PLACE, TILE, TILES, FIRST_HEAD))
    shape = (heads, refs["partial"].shape[-1])

    def cast(x: jax.Array) -> jax.Array:
        return x if layout is None else plgpu.layout_cast(x, layout)

    def load(ref: Ref) -> jax.Array:
        return ref[...] if layout is None else plgpu.load(ref, layout=layout, optimized=False)

    def step(part: jax.Array, _: None) -> None:
        first = jnp.minimum(part * heads, group - heads)  # the last step repeats some heads rather than have fewer
        row = first_row + first
        out = refs["out"].at[token, pl.ds(head * group + first, heads)]

        def store(x: jax.Array) -> None:
            x = x.astype(out.dtype)
            if layout is None:
                out[...] = x
            else:
                plgpu.store(out, x, optimized=False)

        @pl.when(place == SINGLE)
        def _() -> None:
            number = cast(lax.broadcasted_iota(jnp.int32, shape, 0))

            def add(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                acc, top, total = state
                score = cast(jnp.full(shape, 0.0, jnp.float32))
                for h in range(heads):
                    score = jnp.where(number == h, refs["lse"][tile + i, head, row + h], score)
                new_top = jnp.maximum(top, score)
                weight, keep = jnp.exp2(score - new_top), jnp.exp2(top - new_top)
                piece = load(refs["partial"].at[tile + i, head, pl.ds(row, heads)])
                return acc * keep + weight * piece, new_top, total * keep + weight

            start = tuple(cast(jnp.full(shape, x, jnp.float32)) for x in (0.0, NO_KEY, 0.0))
            acc, _, total = lax.fori_loop(0, tiles, add, start)
            store(acc / jnp.where(total == 0.0, 1.0, total))

        if "chunks" in refs:
            pl.when(place == CHUNK)(lambda: store(load(refs["chunks"].at[tile, head, pl.ds(row, heads)])))
        pl.when(place == UNUSED)(lambda: store(cast(jnp.full(shape, 0.0, jnp.float32))))

    lax.fori_loop(0, -(-group // heads), step, None)
