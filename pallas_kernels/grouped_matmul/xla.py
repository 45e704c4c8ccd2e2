"""Grouped matmuls in plain XLA: XLA's own operation for TPUs, and a loop over tiles for all other platforms."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import Float8Weight, Int4Weight, Int8Weight, ScaledWeight
from pallas_kernels.matmul.weights import unscaled

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_SMALLEST_TILE, _LARGEST_TILE = 8, 128


def grouped_matmul_ragged_dot(
    x: Float[Array, "T E"],
    w: Float[Array, "G E F"] | ScaledWeight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
) -> Float[Array, "T F"]:
    """float32[T, F] by `jax.lax.ragged_dot`: a compiler kernel on TPUs; elsewhere every group multiplies all rows.

    On TPUs int8 weights are passed to the kernel unchanged. If w holds more groups than `group_sizes`, the weights in use
    are copied out first.
    """
    count = group_sizes.shape[0]
    if isinstance(w, Int4Weight):
        parts = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, first_group, count), w)
        return grouped_matmul_ragged_dot(x, parts.dequantize().astype(x.dtype), group_sizes, jnp.int32(0))
    values = w.values if isinstance(w, ScaledWeight) else w
    if values.shape[0] != count:
        values = jax.lax.dynamic_slice_in_dim(values, first_group, count)
    if isinstance(w, Float8Weight):
        scales = jax.lax.dynamic_slice_in_dim(w.scales, first_group, count)
        values = unscaled(w, values, scales).astype(x.dtype)
    y = jax.lax.ragged_dot(x, values, group_sizes, preferred_element_type=jnp.float32)
    return scaled_rows(y, w, group_sizes, first_group)


def grouped_matmul_tiles(
    x: Float[Array, "T E"],
    w: Float[Array, "G E F"] | ScaledWeight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
) -> Float[Array, "T F"]:
    """float32[T, F] by a loop over tiles of rows; each tile belongs to one group.

        rows      | a a a a a a a | b b | c c c c c |
        tiles     | 0     | 1     | 2   | 3     | 4 |      rows of a tile outside its group are left unchanged

    The loop has one iteration per tile in use, and only the weights of groups with rows are read.
    """
    num_rows, num_groups = x.shape[0], group_sizes.shape[0]
    tile = min(num_rows, _tile_rows(num_rows, num_groups))
    group_ends = jnp.cumsum(group_sizes)
    tiles = (group_sizes + tile - 1) // tile  # of each group
    tile_ends = jnp.cumsum(tiles)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, i, side="right")
        end = group_ends[group]
        first = end - group_sizes[group] + (i - (tile_ends[group] - tiles[group])) * tile
        start = jnp.minimum(first, num_rows - tile)  # the last tile is shifted back to end with the rows
        rows = jax.lax.dynamic_slice_in_dim(x, start, tile)
        weight = jax.tree.map(partial(jax.lax.dynamic_index_in_dim, index=first_group + group, keepdims=False), w)
        if isinstance(weight, Int4Weight):
            weight = weight.dequantize()
        elif isinstance(weight, Float8Weight):
            weight = unscaled(weight, weight.values, weight.scales)
        elif isinstance(weight, Int8Weight):
            weight = weight.values
        y = jax.lax.dot(rows, weight.astype(x.dtype), preferred_element_type=jnp.float32)
        if has_scales(w):
            y = y * jax.lax.dynamic_index_in_dim(w.scales, first_group + group)
        row = start + jnp.arange(tile)
        mine = (row >= first) & (row < end)
        before = jax.lax.dynamic_slice_in_dim(out, start, tile)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], y, before), start, axis=0)

    zeros = jnp.zeros((num_rows, w.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, tile_ends[-1], body, zeros)


def has_scales(w: object) -> TypeGuard[Int8Weight | Float8Weight]:
    """Whether each output of a matrix has one scale, by which its results are multiplied."""
    return isinstance(w, Int8Weight) or (isinstance(w, Float8Weight) and not w.in_blocks)


def scaled_rows(
    y: Float[Array, "T F"],
    w: Float[Array, "G E F"] | ScaledWeight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
) -> Float[Array, "T F"]:
    """`y`, times the scales of each row's group if w has scales; zero in rows without a group, even where `y` is NaN."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(y.shape[0])
    if has_scales(w):
        group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), group_sizes.shape[0] - 1)
        y = y * w.scales[first_group + group]
    return jnp.where((row < ends[-1])[:, None], y, 0.0)


def _tile_rows(num_rows: int, num_groups: int) -> int:
    """The smallest power of two not below an equal share of the rows: larger tiles would be mostly empty."""
    share = -(-num_rows // num_groups)
    return min(max(1 << (share - 1).bit_length(), _SMALLEST_TILE), _LARGEST_TILE)
