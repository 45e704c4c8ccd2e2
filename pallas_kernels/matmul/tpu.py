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
from pallas_kernels.matmul.tpu_support import Tiles, modeled, modeled_int4
from pallas_kernels.matmul.weights import Int8Weight
from pallas_kernels.pallas_types import Ref

if TYPE_CHECKING:
    from jaxtyping import Array, Float


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
    w: jax.Array | Int8Weight | Int4Weight, *, num_rows: int, num_groups: int, itemsize: int, tile_rows: int | None = None
) -> Tiles:
    """The modeled division of a product with matrices of a stack, see `tpu_support`."""
    if not isinstance(w, Int4Weight):
        stored = w.values.dtype if isinstance(w, Int8Weight) else w.dtype
        return modeled(w.shape, stored.itemsize, num_rows=num_rows, num_groups=num_groups, tile_rows=tile_rows)
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
    x: Float[Array, "T K"],
    w: Float[Array, "G K N"] | Int8Weight | Int4Weight,
    work: Work,
    *,
    tiles: Tiles,
    narrow: bool | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T N"]:
    """float32[T, N]: each item's rows times the matrix of its group. Rows of tiles without an item are uninitialized; other
    rows without a group are zero.

    Args:
      x: float32 or bfloat16.
      w: an `Int4Weight` in whole tiles, see `tpu_support.fits_int4`.
      work: with the rows of `tiles`.
      tiles: how the kernel divides its work.
      narrow: whether int4 is multiplied with its scales in bfloat16; None: if x is bfloat16, and the TPU can.
      interpret: passed to `pl.pallas_call`.
    """
    num_rows, depth = x.shape
    num_columns = w.shape[-1]
    device = tpu_target.device()
    scratch = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)]
    is_int4 = isinstance(w, Int4Weight)
    if narrow is None:
        narrow = is_int4 and x.dtype == jnp.bfloat16 and device.computes_bfloat16
    if isinstance(w, Int4Weight):
        operands = [w.values, w.scales] + ([] if w.offsets is None else [w.offsets])
        if narrow and w.offsets is not None:
            scratch.append(pltpu.VMEM((2, w.scales.shape[1], tiles.columns), jnp.float32))
    else:
        operands = [w.values if isinstance(w, Int8Weight) else w]
    scales = []
    if isinstance(w, Int8Weight):  # those of these groups, as rows of their own
        scales = [jax.lax.dynamic_slice_in_dim(w.scales, work.counts[2], work.starts.shape[0])[:, None, :]]
    num_parts = depth // tiles.depth

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

    column_bytes = sum(part.shape[1] * part.dtype.itemsize for part in operands)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            tiles=tiles,
            num_parts=num_parts,
            num_operands=len(operands) + len(scales),
            is_int4=is_int4,
            narrow=bool(narrow),
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(num_columns, tiles.columns), work.num_items, num_parts),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.depth), x_block),
                *(pl.BlockSpec((pl.squeezed, part.shape[1] // num_parts, tiles.columns), w_block) for part in operands),
                *(pl.BlockSpec((pl.squeezed, 1, tiles.columns), scales_block) for _ in scales),
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
    )(*work[:5], x, *operands, *scales)


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
    is_int4: bool,
    narrow: bool,
) -> None:
    # x [rows, depth], weights [depth, columns] and their scales, out and sums [rows, columns]
    weights, (out, sums, *shares) = refs[:num_operands], refs[num_operands:]
    item, part = pl.program_id(1), pl.program_id(2)

    @pl.when(part == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(item < counts[0])
    def _() -> None:
        if is_int4:
            values, scales, *offsets = weights
            some = offsets[0] if offsets else None
            memory = shares[0] if shares else None
            tpu_int4.add_product(sums, x, values, scales, some, memory, step=tiles.step, narrow=narrow)
            return
        exact = x.dtype == jnp.float32  # the MXU multiplies bfloat16; full float32 precision takes several passes
        sums[...] += jax.lax.dot(
            x[...],
            weights[0][...].astype(x.dtype),
            preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        )

    @pl.when(part == num_parts - 1)
    def _() -> None:
        row = tile[item] * tiles.rows + jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        mine = (row >= starts[group[item]]) & (row < ends[group[item]])
        first_of_tile = (item == 0) | (tile[jnp.maximum(item - 1, 0)] != tile[item])
        of_outputs = [scales[...] for scales in weights[1:]] if not is_int4 else [1 / tpu_int4.FACTOR]
        result = sums[...] * of_outputs[0] if of_outputs else sums[...]
        # Before the first group writes to the tile, its memory is uninitialized.
        out[...] = jnp.where(mine, result, jnp.where(first_of_tile, 0.0, out[...]))
