"""Sums over devices that add up every element in the order of the devices, from the first to the last.

An all-reduce adds the parts of an element in an order that depends on its place in the array: in a ring, each device begins
with another share. A sum here moves as many bytes as one in a ring:

    device 0    a0 b0 c0 d0                 a0 a1 a2 a3    ->  a            a b c d
    device 1    a1 b1 c1 d1   all-to-all    b0 b1 b2 b3    ->  b   gather   a b c d
    device 2    a2 b2 c2 d2      --->       c0 c1 c2 c3    ->  c    --->    a b c d
    device 3    a3 b3 c3 d3                 d0 d1 d2 d3    ->  d            a b c d

Both functions are for use within a `shard_map`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def ordered_sum(
    x: Float[Array, "rows columns"],
    axis: str,
    num_devices: int,
    *,
    residual: Float[Array, "rows columns"] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "rows columns"]:
    """The sum of x over the devices of an axis of the mesh (+ residual), on each of them.

    Args:
      x: floating point; its parts are added in float32.
      axis: name of the axis.
      num_devices: its size.
      residual: the same on all devices; added in float32, before the result is rounded once.
      dtype: of the result; None means that of x.
    """
    dtype = x.dtype if dtype is None else dtype
    rows, columns = x.shape
    by = 1 if rows % num_devices and not columns % num_devices else 0  # the axis that is divided into shares

    def filled(array: jax.Array) -> jax.Array:
        missing = -array.shape[by] % num_devices
        return jnp.pad(array, ((0, missing), (0, 0))) if missing else array

    x = filled(x)
    size = x.shape[by] // num_devices
    shares = (num_devices, size, columns) if by == 0 else (rows, num_devices, size)
    total = _added(jax.lax.all_to_all(x.reshape(shares), axis, split_axis=by, concat_axis=0))
    if residual is not None:
        first = jax.lax.axis_index(axis) * size
        mine = jax.lax.dynamic_slice_in_dim(filled(residual), first, size, axis=by)
        total = total + mine.astype(jnp.float32)
    return jax.lax.all_gather(total.astype(dtype), axis, axis=by, tiled=True)[:rows]


def ordered_sum_of_few(x: Float[Array, "*shape"], axis: str) -> Float[Array, "*shape"]:
    """The same sum, in float32, for a few numbers a row: each device gets those of all and adds them by itself."""
    return _added(jax.lax.all_gather(x, axis))


def _added(parts: jax.Array) -> jax.Array:
    """The sum of parts [devices, ...] in float32. Not `jnp.sum`, whose order is the compiler's choice."""
    total = parts[0].astype(jnp.float32)
    for part in range(1, parts.shape[0]):
        total = total + parts[part].astype(jnp.float32)
    return total
