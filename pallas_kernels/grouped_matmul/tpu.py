"""Grouped matmul on a TPU, for weights that are part of a larger stack.

`jax.lax.ragged_dot` is a good kernel of the TPU compiler, but it needs its weights as a separate array: inside a scan over
layers the compiler copies the layer's experts out of the stack in every step. This kernel reads them in place.

The work is a list of (group, tile of rows) pairs, computed beforehand and passed in scalar memory:

    rows      | a a a a a a a | b b | c c c c c |      groups a, b, c
    tiles     | 0       | 1       | 2       |          work: (a, 0) (a, 1) (b, 1) (c, 1) (c, 2)

A tile shared by several groups is computed once per group, in consecutive items; each group writes only its own rows.
Tiles after the last group are items that write zeros and fetch nothing.
Source: MegaBlocks (arXiv:2211.15841).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu_support import LANES
from pallas_kernels.matmul import Int8Weight

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_WEIGHT_TILE_BYTES = 2 << 20  # two are in flight: copies of a few MiB come close to the full memory bandwidth
_SUBLANES = 16  # rows of a bfloat16 tile; a float32 tile has 8


def grouped_matmul_tpu(
    x: Float[Array, "T E"],
    w: Float[Array, "G E F"] | Int8Weight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
    *,
    tile_rows: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T F"]:
    """float32[T, F]; see `pallas_kernels.grouped_matmul.grouped_matmul`.

    If `tile_rows` is None, it is chosen from the number of rows. `interpret` is passed to `pl.pallas_call`.
    """
    values = w.values if isinstance(w, Int8Weight) else w
    num_rows, depth = x.shape
    num_groups, num_columns = group_sizes.shape[0], values.shape[2]
    rows = tile_rows or _tile_rows(num_rows, num_groups)
    tile_depth, tile_columns = _weight_tile(depth, num_columns, values.dtype.itemsize)
    plan = _plan(group_sizes, first_group, rows=rows, row_tiles=pl.cdiv(num_rows, rows))
    if isinstance(w, Int8Weight):  # those of this layer, as rows of their own
        scales = [jax.lax.dynamic_slice_in_dim(w.scales, first_group, num_groups)[:, None, :]]
    else:
        scales = []

    num_parts = depth // tile_depth

    def part_of(item, k, counts):  # of the last product, which is already there, for a tile of zeros
        return jnp.where(item < counts[0], k, num_parts - 1)

    def x_block(column, item, k, group, tile, starts, ends, counts):
        return jnp.minimum(tile[item], counts[1]), part_of(item, k, counts)

    def w_block(column, item, k, group, tile, starts, ends, counts):
        return counts[2] + group[item], part_of(item, k, counts), column

    def scales_block(column, item, k, group, *_):
        return group[item], 0, column

    def out_block(column, item, k, group, tile, *_):
        return tile[item], column

    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, num_parts=num_parts),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(num_columns, tile_columns), plan.num_items, num_parts),
            in_specs=[
                pl.BlockSpec((rows, tile_depth), x_block),
                pl.BlockSpec((pl.squeezed, tile_depth, tile_columns), w_block),
                *[pl.BlockSpec((pl.squeezed, 1, tile_columns), scales_block) for _ in scales],
            ],
            out_specs=pl.BlockSpec((rows, tile_columns), out_block),
            scratch_shapes=[pltpu.VMEM((rows, tile_columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * num_columns,
            bytes_accessed=num_groups * depth * num_columns * values.dtype.itemsize
            + num_rows * (depth * x.dtype.itemsize + 4 * num_columns),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*plan[:5], x, values, *scales)


class _Plan(NamedTuple):
    """The work items: products, then tiles of zeros. The first five are the kernel's scalars."""

    group: Int[Array, " items"]  # of a tile of zeros: that of the last product
    tile: Int[Array, " items"]
    starts: Int[Array, " X"]  # first row of each group
    ends: Int[Array, " X"]
    counts: Int[Array, " three"]  # number of products, last tile of a product, and the given `first_group`
    num_items: Int[Array, ""]


def _plan(group_sizes: Int[Array, " X"], first_group: Int[Array, ""], *, rows: int, row_tiles: int) -> _Plan:
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    # `div` rounds towards zero, which for these numbers is the same as `//` and one operation instead of ten.
    first_tile, end_tile = jax.lax.div(starts, rows), jax.lax.div(ends - 1, rows) + 1
    tiles = jnp.where(group_sizes > 0, end_tile - first_tile, 0)
    work_ends = jnp.cumsum(tiles)
    num_products, used_tiles = work_ends[-1:], jnp.max(jnp.where(group_sizes > 0, end_tile, 0), keepdims=True)
    item = jnp.arange(row_tiles + num_groups - 1)
    product = jnp.minimum(item, jnp.maximum(num_products - 1, 0))
    # All comparisons at once: a binary search would be a loop.
    group = jnp.searchsorted(work_ends, product, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    of_product = item + jnp.take(first_tile - work_ends + tiles, group, mode="clip")
    tile = jnp.where(item < num_products, of_product, used_tiles + item - num_products)
    return _Plan(
        group=group,
        tile=jnp.minimum(tile, row_tiles - 1),
        starts=starts,
        ends=ends,
        counts=jnp.concatenate([num_products, jnp.maximum(used_tiles - 1, 0), first_group[None]]),
        num_items=(num_products + row_tiles - used_tiles)[0],
    )


def _kernel(group, tile, starts, ends, counts, x, w, *refs, rows: int, num_parts: int) -> None:
    *scales, out, sums = refs  # x [rows, depth], w [depth, columns], scales [1, columns], out and sums [rows, columns]
    item, part = pl.program_id(1), pl.program_id(2)

    @pl.when(part == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(item < counts[0])
    def _() -> None:
        exact = x.dtype == jnp.float32  # the MXU multiplies bfloat16; full float32 precision takes several passes
        sums[...] += jax.lax.dot(
            x[...],
            w[...].astype(x.dtype),
            preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        )

    @pl.when(part == num_parts - 1)
    def _() -> None:
        row = tile[item] * rows + jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        mine = (row >= starts[group[item]]) & (row < ends[group[item]])
        first_of_tile = (item == 0) | (tile[jnp.maximum(item - 1, 0)] != tile[item])
        result = sums[...] * scales[0][...] if scales else sums[...]
        # Before the first group writes to the tile, its memory is uninitialized.
        out[...] = jnp.where(mine, result, jnp.where(first_of_tile, 0.0, out[...]))


def _tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows per tile: about one group's share, so that few rows are wasted; in [16, 512]."""
    share = -(-num_rows // num_groups)
    wanted = min(max(1 << (share - 1).bit_length(), _SUBLANES), 512)
    return min(wanted, -(-num_rows // _SUBLANES) * _SUBLANES)


def _weight_tile(depth: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(depth, columns) of a tile of the weights: a divisor of the depth, and as many columns as the size allows."""
    widths = [width for width in (512, 256, LANES) if width <= columns] or [columns]
    for width in widths:
        if depth * width * itemsize <= _WEIGHT_TILE_BYTES:  # the whole depth: tiles of one group share the weights
            return depth, width
    width = widths[0]
    fitting = [
        part for part in range(LANES, depth, LANES) if depth % part == 0 and part * width * itemsize <= _WEIGHT_TILE_BYTES
    ]
    return (fitting[-1] if fitting else depth), width
