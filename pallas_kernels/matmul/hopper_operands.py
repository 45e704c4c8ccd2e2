"""Weights in the registers of a Hopper's warpgroup, on their way to the buffer that the tensor cores read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.matmul.int4 import INT4_ROWS, float_halves
from pallas_kernels.pallas_types import Ref

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of its functions

_WARPS, _LANE_COLUMNS, _WARP_ROWS, _WARP_COLUMNS = 4, 8, 8, 32


def load_columns(vector: Ref, layout: Any, *, interpreted: bool) -> jax.Array:
    """float32: the numbers of `vector`, for rows that are held as `layout` says."""
    loaded = vector[...] if interpreted else plgpu.load(vector, layout=layout.reduce(0), optimized=False)
    return loaded.astype(jnp.float32)


def in_every_row(numbers: jax.Array, shape: tuple[int, ...], layout: Any, *, interpreted: bool) -> jax.Array:
    """What `load_columns` gave, in each row of `shape`."""
    rows = lax.broadcast_in_dim(numbers, shape, [1])
    return rows if interpreted else plgpu.layout_cast(rows, layout)


def write_int8(source: Ref, target: Ref, *, interpreted: bool) -> None:
    """The int8 `source` [inputs, columns] in the dtype of `target`; they are the same in 16 bits."""
    if interpreted:
        target[...] = source[...].astype(target.dtype)
        return
    numbers = plgpu.load(source, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False).astype(jnp.bfloat16)
    target[...] = numbers if target.dtype == jnp.bfloat16 else numbers.astype(jnp.float32).astype(target.dtype)


def write_int4(source: Ref, target: Ref, scales: Ref, offsets: Ref | None, *, interpreted: bool) -> None:
    """The int4 `source` [32 rows of bytes, columns] times scales, plus offsets: 64 rows in the dtype of `target`.

    `scales` and `offsets` are [1, columns], or [2, columns] if each half of the rows has its own.
    """
    shape = source.shape
    layout = _bytes_layout(shape[1])

    def columns(array: Ref, row: int) -> jax.Array:
        return load_columns(array.at[row if array.shape[0] == 2 else 0], layout, interpreted=interpreted)

    def spread(numbers: jax.Array) -> jax.Array:
        return in_every_row(numbers, shape, layout, interpreted=interpreted)

    halves = []
    numbers = source[...] if interpreted else plgpu.load(source, layout=layout)
    for row, half in enumerate(float_halves(numbers)):
        factor, term = half.dequantized(columns(scales, row), None if offsets is None else columns(offsets, row))
        values = half.values * spread(factor)
        values = values if term is None else values + spread(term)
        halves.append(values.astype(target.dtype))
    target[...] = jnp.concatenate(halves)


def _bytes_layout(columns: int) -> Any:
    """The places of 32 rows of bytes in registers: a thread has 8 columns of a row, and the same ones of 2 or 4 rows.

    So the scales of a thread are few, and neither its loads nor its stores of 16 bits meet those of others in a bank.
    """
    across = columns // _WARP_COLUMNS  # warps
    rows = INT4_ROWS * across // _WARPS  # of a warp
    return plgpu.Layout.TILED(
        plgpu.Tiling(((INT4_ROWS, columns), (rows, _WARP_COLUMNS), (_WARP_ROWS, _WARP_COLUMNS), (_LANE_COLUMNS,))),
        warp_dims=(-6,) if across == _WARPS else (-7, -6),
        lane_dims=(-2, -3),
        vector_dim=-1,
    )
