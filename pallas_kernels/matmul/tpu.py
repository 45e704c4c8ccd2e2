"""Products of tiles of rows with matrices of a stack, on TPUs.

The matrices are read where they are, and which of them a tile of rows is multiplied with is data: a list of (matrix, tile of
rows) pairs in scalar memory. A tile of rows that several matrices share is in consecutive items; each writes its own rows.
Items after the products write tiles of zeros and fetch nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_target
from pallas_kernels.matmul import tpu_int4
from pallas_kernels.matmul.int4 import Int4Weight
from pallas_kernels.matmul.tpu_support import LANES, Tiles, modeled, modeled_int4
from pallas_kernels.matmul.weights import Float8Weight, Int8Weight, ScaledWeight
from pallas_kernels.pallas_types import Ref

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Num


_SUBLANES = 8  # rows of a register


class Work(NamedTuple):
    """The items, in i32: products, then tiles of zeros."""

    group: jax.Array
    """[items], counted from the first matrix that is multiplied with; of a tile of zeros that of the last product."""
    tile: jax.Array
    """[items], of rows."""
    starts: jax.Array
    """[groups], the first row of each."""
    ends: jax.Array
    """[groups]"""
    counts: jax.Array
    """[3]: how many products there are, the last tile of one, and the matrix of group 0."""
    num_items: jax.Array | int
    """Of products and of tiles of zeros."""


def multiply(
    x: Float[Array, "T K"],
    w: Int4Weight,
    *,
    tiles: Tiles | None = None,
    narrow: bool | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T N"]:
    """float32[T, N]: x times the matrix of `w` that its layer selects.

    If `tiles` is None, they are modeled. `narrow` and `interpret` as for `multiply_items`.
    """
    assert w.layer is not None, "a stack without a selected layer is no matrix"
    num_rows = x.shape[0]
    tiles = tiles or tiles_of(w, num_rows=num_rows, num_groups=1, itemsize=x.dtype.itemsize)
    row_tiles = -(-num_rows // tiles.rows)
    work = Work(
        group=jnp.zeros(row_tiles, jnp.int32),
        tile=jnp.asarray(np.arange(row_tiles), jnp.int32),
        starts=jnp.zeros(1, jnp.int32),
        ends=jnp.asarray([num_rows], jnp.int32),
        counts=jnp.stack([jnp.int32(row_tiles), jnp.int32(row_tiles - 1), w.layer]),
        num_items=row_tiles,
    )
    return multiply_items(x, w, work, tiles=tiles, narrow=narrow, interpret=interpret)


def tiles_of(
    w: jax.Array | ScaledWeight, *, num_rows: int, num_groups: int, itemsize: int, tile_rows: int | None = None
) -> Tiles:
    """The modeled division of a product with matrices of a stack, see `tpu_support`. `itemsize` is that of a row."""
    if not isinstance(w, Int4Weight):
        stored = w.values.dtype if isinstance(w, ScaledWeight) else w.dtype
        return modeled(w.shape, stored.itemsize, itemsize, num_rows=num_rows, num_groups=num_groups, tile_rows=tile_rows)
    return modeled_int4(
        w.shape,
        w.size,
        itemsize,
        num_rows=num_rows,
        num_groups=num_groups,
        device=tpu_target.device(),
        tile_rows=tile_rows,
    )


def multiply_items(
    x: Num[Array, "T K"],
    w: Float[Array, "G K N"] | ScaledWeight,
    work: Work,
    *,
    tiles: Tiles,
    factors: Float32[Array, "T one"] | None = None,
    narrow: bool | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T N"]:
    """float32[T, N]: each item's rows times the matrix of its group. Rows of tiles without an item are uninitialized; other
    rows without a group are zero.

    Args:
      x: float32 or bfloat16; or rows in the 8 bits of `w`, which are multiplied as they are. Sums of int8 are int32.
      w: an `Int4Weight` in whole tiles, see `tpu_support.fits_int4`; a `Float8Weight` with scales of outputs.
      work: with the rows of `tiles`.
      tiles: how the kernel divides its work.
      factors: f32[T, 1], by which the results of each row are multiplied.
      narrow: whether int4 is multiplied with its scales in bfloat16; None: if x is bfloat16, and the TPU can.
      interpret: passed to `pl.pallas_call`.
    """
    num_rows, depth = x.shape
    num_columns = w.shape[-1]
    device = tpu_target.device()
    scratch = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.int32 if x.dtype == jnp.int8 else jnp.float32)]
    is_int4 = isinstance(w, Int4Weight)
    # Whole rows of a TPU's memory have the inputs last. XLA itself stores the others with the outputs last.
    inputs_last = isinstance(w, Float8Weight) and depth % LANES == 0
    if narrow is None:
        narrow = is_int4 and x.dtype == jnp.bfloat16 and device.computes_bfloat16
    if isinstance(w, Int4Weight):
        operands = [w.values, w.scales] + ([] if w.offsets is None else [w.offsets])
        if narrow and w.offsets is not None:
            scratch.append(pltpu.VMEM((2, w.scales.shape[1], tiles.columns), jnp.float32))
    else:
        operands = [w.values if isinstance(w, ScaledWeight) else w]
        if isinstance(w, Float8Weight) and not inputs_last:
            operands = [jnp.swapaxes(w.values, 1, 2)]
    # A tile has the scales of as many matrices as a register has rows; those of a single one would be another layout.
    scales = [w.scales] if isinstance(w, Int8Weight | Float8Weight) else []
    scale_rows = min(_SUBLANES, w.shape[0])
    num_parts = depth // tiles.depth

    def part_of(item, k, counts):  # of the last product, which is already there, for a tile of zeros
        return jnp.where(item < counts[0], k, num_parts - 1)

    def x_block(column, item, k, group, tile, starts, ends, counts):
        return jnp.minimum(tile[item], counts[1]), part_of(item, k, counts)

    def w_block(column, item, k, group, tile, starts, ends, counts):
        return counts[2] + group[item], part_of(item, k, counts), column

    def inputs_last_block(column, item, k, group, tile, starts, ends, counts):
        return counts[2] + group[item], column, part_of(item, k, counts)

    def scales_block(column, item, k, group, tile, starts, ends, counts):
        return jax.lax.div(counts[2] + group[item], scale_rows), column

    def factors_block(column, item, k, group, tile, starts, ends, counts):
        return jnp.minimum(tile[item], counts[1]), 0

    def out_block(column, item, k, group, tile, *_):
        return tile[item], column

    if inputs_last:
        of_weights = [pl.BlockSpec((pl.squeezed, tiles.columns, tiles.depth), inputs_last_block)]
        column_bytes = depth
    else:
        of_weights = [pl.BlockSpec((pl.squeezed, part.shape[1] // num_parts, tiles.columns), w_block) for part in operands]
        column_bytes = sum(part.shape[1] * part.dtype.itemsize for part in operands)
    of_rows = [] if factors is None else [factors]
    return pl.pallas_call(
        functools.partial(
            _kernel,
            tiles=tiles,
            num_parts=num_parts,
            num_operands=len(operands),
            scale_rows=scale_rows if scales else None,
            has_factors=factors is not None,
            contracted=int(inputs_last),
            is_int4=is_int4,
            narrow=bool(narrow),
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(num_columns, tiles.columns), work.num_items, num_parts),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.depth), x_block),
                *of_weights,
                *(pl.BlockSpec((scale_rows, tiles.columns), scales_block) for _ in scales),
                *(pl.BlockSpec((tiles.rows, 1), factors_block) for _ in of_rows),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), out_block),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=device.vmem_limit if is_int4 else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * num_columns,
            bytes_accessed=work.starts.shape[0] * num_columns * column_bytes
            + num_rows * (depth * x.dtype.itemsize + 4 * num_columns),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*work[:5], x, *operands, *scales, *of_rows)


def _kernel(
    group: Ref,
    tile: Ref,
    starts: Ref,
    ends: Ref,
    counts: Ref,
    x: Ref,
    *refs: Ref,
    tiles: Tiles,
    num_parts: int,
    num_operands: int,
    scale_rows: int | None,
    has_factors: bool,
    contracted: int,
    is_int4: bool,
    narrow: bool,
) -> None:
    # x [rows, depth], weights [depth, columns] or, if axis 1 is contracted, [columns, depth], scales [scale_rows, columns],
    # factors [rows, 1], out and sums [rows, columns]
    weights, rest = refs[:num_operands], list(refs[num_operands:])
    scales = rest.pop(0) if scale_rows else None
    factors = rest.pop(0) if has_factors else None
    out, sums, *shares = rest
    item, part = pl.program_id(1), pl.program_id(2)

    @pl.when(part == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(item < counts[0])
    def _() -> None:
        if is_int4:
            values, of_inputs, *offsets = weights
            some = offsets[0] if offsets else None
            memory = shares[0] if shares else None
            tpu_int4.add_product(sums, x, values, of_inputs, some, memory, step=tiles.step, narrow=narrow)
            return
        exact = x.dtype == jnp.float32  # the MXU multiplies bfloat16; full float32 precision takes several passes
        sums[...] += jax.lax.dot_general(
            x[...],
            weights[0][...].astype(x.dtype),
            (((1,), (contracted,)), ((), ())),
            preferred_element_type=sums.dtype,
            precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        )

    @pl.when(part == num_parts - 1)
    def _() -> None:
        row = tile[item] * tiles.rows + jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        mine = (row >= starts[group[item]]) & (row < ends[group[item]])
        first_of_tile = (item == 0) | (tile[jnp.maximum(item - 1, 0)] != tile[item])
        result = sums[...].astype(jnp.float32)
        if is_int4:
            result = result * (1 / tpu_int4.FACTOR)
        if scales is not None and scale_rows is not None:
            result = result * scales[pl.ds(jax.lax.rem(counts[2] + group[item], scale_rows), 1), :]
        if factors is not None:
            result = result * factors[...]
        # Before the first group writes to the tile, its memory is uninitialized.
        out[...] = jnp.where(mine, result, jnp.where(first_of_tile, 0.0, out[...]))
