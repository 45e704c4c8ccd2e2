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

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul import Float8Weight, Int4Weight, Int8Weight, ScaledWeight
from pallas_kernels.matmul.narrow import float8_rows, int8_rows
from pallas_kernels.matmul.tpu import Work, multiply_items, tiles_of
from pallas_kernels.matmul.tpu_support import LANES, fits_int4

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def grouped_matmul_tpu(
    x: Float[Array, "T E"],
    w: Float[Array, "G E F"] | ScaledWeight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
    *,
    tile_rows: int | None = None,
    narrow: bool | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T F"]:
    """float32[T, F]; see `pallas_kernels.grouped_matmul.grouped_matmul`. A `Float8Weight` also rounds rows to 8 bits.

    If `tile_rows` is None, it is chosen from the number of rows; with rows of 8 bits it must be a multiple of 32. `narrow`
    and `interpret` as for `multiply_items`. Raises ValueError if the kernel does not support an `Int4Weight`, or the
    `Float8Weight` is in blocks.
    """
    if isinstance(w, Int4Weight) and not fits_int4(w, w.shape):
        raise ValueError(
            f"implementation='tpu' multiplies with int4 weights [G, E, F] if E is a multiple of 64, F of {LANES}, and 32, "
            f"64, 128 or 256 inputs share a float32 scale, but w is {list(w.shape)} and {w.size} share one of "
            f"{w.scales.dtype}; pass implementation='tiles'"
        )
    if isinstance(w, Float8Weight) and w.in_blocks:
        raise ValueError(
            "implementation='tpu' multiplies 8-bit floats with one scale per output, but w has scales of blocks; pass "
            "implementation='tiles'"
        )
    num_rows, num_groups = x.shape[0], group_sizes.shape[0]
    factors = None
    if isinstance(w, Float8Weight):
        x, factors = float8_rows(x)
    elif isinstance(w, Int8Weight) and w.rounds_rows:
        x, factors = int8_rows(x)
    tiles = tiles_of(w, num_rows=num_rows, num_groups=num_groups, itemsize=x.dtype.itemsize, tile_rows=tile_rows)
    work = _plan(group_sizes, first_group, rows=tiles.rows, row_tiles=pl.cdiv(num_rows, tiles.rows))
    return multiply_items(x, w, work, tiles=tiles, factors=factors, narrow=narrow, interpret=interpret)


def _plan(group_sizes: Int[Array, " X"], first_group: Int[Array, ""], *, rows: int, row_tiles: int) -> Work:
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
    return Work(
        group=group,
        tile=jnp.minimum(tile, row_tiles - 1),
        starts=starts,
        ends=ends,
        counts=jnp.concatenate([num_products, jnp.maximum(used_tiles - 1, 0), first_group[None]]),
        num_items=(num_products + row_tiles - used_tiles)[0],
    )
