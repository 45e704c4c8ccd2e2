"""Products of tiles of rows with matrices of a stack, on GPUs of compute capability 8.x (Ampere, Ada Lovelace): Triton.

As in `hopper.py`, the matrices are read where they are, and which of them a tile has is data. A program of the grid computes
some columns of a tile for some of the inputs; int8 and int4 become the dtype of the activations in registers. The bytes of
int4 hold the first and the last inputs of a step, which are multiplied one after the other.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.matmul.ampere_support import Tiles, modeled, tile_rows
from pallas_kernels.matmul.hopper_support import GRANULE, GRANULES, MATRIX, ROW, one_matrix, sum_of_splits
from pallas_kernels.matmul.int4 import INT4_ROWS, Int4Weight, float_halves, size_of
from pallas_kernels.matmul.weights import Int8Weight
from pallas_kernels.pallas_types import Ref

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def multiply(
    x: Float[Array, "T K"], w: Int8Weight | Int4Weight, *, tiles: Tiles | None = None, interpret: bool = False
) -> Float[Array, "T N"]:
    """float32[T, N]: x times the matrix of `w` that its layer selects. If `tiles` is None, they are modeled."""
    assert w.layer is not None, "a stack without a selected layer is no matrix"
    num_rows = x.shape[0]
    if tiles is None:
        rows = tile_rows(num_rows)
        tiles = modeled(-(-num_rows // rows), (1, *w.shape), w.values.dtype, rows=rows)
    x, work = one_matrix(x, tiles.rows)
    return sum_of_splits(multiply_tiles(x, w, work, w.layer, tiles=tiles, interpret=interpret))[:num_rows]


def multiply_tiles(
    x: Float[Array, "P K"],
    w: Float[Array, "G K N"] | Int8Weight | Int4Weight,
    work: Int[Array, "tiles columns"],
    first: Int[Array, ""],
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "splits P N"]:
    """float32; see `hopper.multiply_tiles`. `interpret` is passed to `pl.pallas_call`."""
    values: jax.Array = w.values if isinstance(w, Int8Weight | Int4Weight) else w
    factors = [w.scales] if isinstance(w, Int8Weight | Int4Weight) else []
    if isinstance(w, Int4Weight) and w.offsets is not None:
        factors.append(w.offsets)
    num_columns = w.shape[-1]
    return pl.pallas_call(
        functools.partial(_multiply, tiles=tiles, size=size_of(w)),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, x.shape[0], num_columns), jnp.float32),
        # Programs that run at the same time have the same columns and other rows, so that they read the same weights.
        grid=(work.shape[0] - 1, -(-num_columns // tiles.columns), tiles.splits),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="multiply_tiles",
    )(work, first.reshape(1), x, values, *factors)


def _multiply(work: Ref, first: Ref, x: Ref, w: Ref, *rest: Ref, tiles: Tiles, size: int | None) -> None:
    """One program of the grid. `size`: inputs of int4 that share a scale."""
    *factors, out = rest
    tile, split = pl.program_id(0), pl.program_id(2)
    (num_rows, num_inputs), num_columns = x.shape, w.shape[2]
    column = pl.program_id(1) * tiles.columns
    columns = pl.ds(column, tiles.columns)
    has_column = column + jnp.arange(tiles.columns) < num_columns

    @pl.when(tile < work[work.shape[0] - 1, 0])
    def _() -> None:
        matrix, row = first[0] + work[tile, MATRIX], work[tile, ROW]
        rows = pl.ds(row, tiles.rows)
        has_row = row + jnp.arange(tiles.rows) < num_rows
        num_steps = num_inputs // tiles.depth
        steps = -(-num_steps // tiles.splits)

        def load_left(first: jax.Array, depth: int) -> jax.Array:
            return triton.load(x.at[rows, pl.ds(first, depth)], mask=has_row[:, None], other=0.0)

        def load_right(first: jax.Array, depth: int) -> jax.Array:
            return triton.load(w.at[matrix, pl.ds(first, depth), columns], mask=has_column[None, :], other=0)

        def of_columns(factor: Ref, *block: jax.Array) -> jax.Array:
            numbers = triton.load(factor.at[matrix, *block, columns], mask=has_column, other=0.0)
            return numbers.astype(jnp.float32)[None, :]

        def step(i: jax.Array, acc: jax.Array) -> jax.Array:
            inputs = i * tiles.depth
            if size is None:
                left = load_left(inputs, tiles.depth)
                return acc + triton.dot(left, load_right(inputs, tiles.depth).astype(left.dtype))
            for number, half in enumerate(float_halves(load_right(i * INT4_ROWS, INT4_ROWS))):
                left = load_left(inputs + number * INT4_ROWS, INT4_ROWS)
                block = lax.div(inputs + (number * INT4_ROWS if size == INT4_ROWS else 0), jnp.int32(size))
                scales, *offsets = (of_columns(factor, block) for factor in factors)
                factor, term = half.dequantized(scales, offsets[0] if offsets else None)
                right = half.values * factor if term is None else half.values * factor + term
                acc += triton.dot(left, right.astype(left.dtype))
            return acc

        end = jnp.minimum((split + 1) * steps, num_steps)
        acc = lax.fori_loop(split * steps, end, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
        if factors and size is None:
            acc = acc * of_columns(factors[0])
        is_own = (jnp.arange(tiles.rows) < GRANULE * work[tile, GRANULES]) & has_row
        triton.store(out.at[split, rows, columns], acc, mask=is_own[:, None] & has_column[None, :])
