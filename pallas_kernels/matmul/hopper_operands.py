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


def in_every_row(vector: Ref, shape: tuple[int, ...], layout: Any, *, interpreted: bool, factor: float = 1.0) -> jax.Array:
    """float32 of `shape`: the numbers of `vector`, times `factor`, in each row, held as `layout` says."""
    if interpreted:
        return jnp.broadcast_to((vector[...].astype(jnp.float32) * factor)[None, :], shape)
    numbers = plgpu.load(vector, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
    numbers = numbers if factor == 1.0 else numbers * factor
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, shape, [1]), layout)


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

    def factors(array: Ref, half: int, factor: float = 1.0) -> jax.Array:
        row = array.at[half if array.shape[0] == 2 else 0]
        return in_every_row(row, shape, layout, interpreted=interpreted, factor=factor)

    halves = []
    numbers = source[...] if interpreted else plgpu.load(source, layout=layout, optimized=False)
    for half, (unit, values) in enumerate(float_halves(numbers)):
        values = values * factors(scales, half, 1 / unit)
        values = values if offsets is None else values + factors(offsets, half)
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
