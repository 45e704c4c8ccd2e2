"""Products with weights of 4 bits within a TPU kernel: numbers are unpacked in VMEM, next to the product that needs them.

A word of 32 bits has 4 bytes, one below the other in the matrix. Masked, with the lower half shifted, they are 4 numbers of
8 bits, 16 times those of the weight, in the order of its rows:

    word      | h3 l3 | h2 l2 | h1 l1 | h0 l0 |
    & mask    | h3  0 | h2  0 | h1  0 | h0  0 |     rows 32 to 63 of 64 inputs
    << 4      | l3  0 | l2  0 | l1  0 | l0  0 |     rows 0 to 31

The vector unit is busier than memory, so every operation on all weights counts: the factor 16 is removed from the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.matmul.int4 import INT4_ROWS
from pallas_kernels.matmul.tpu_support import LANES, SUBLANES
from pallas_kernels.pallas_types import Ref

FACTOR = 16
"""Sums have to be divided by this."""
_UPPER_HALVES = -0x0F0F0F10  # 0xF0F0F0F0
_SMALLEST_SHARE = 2.0**-20  # of an offset, that a scale may be: more, and multiples of it are rounded away


def add_product(
    sums: Ref, x: Ref, values: Ref, scales: Ref, offsets: Ref | None, shares: Ref | None, *, step: int, narrow: bool
) -> None:
    """Adds x [rows, K] times FACTOR times the matrix [K, columns] to `sums` [rows, columns], some inputs at a time.

    Args:
      sums: float32.
      x: float32 or bfloat16.
      values: uint8[K / 2, columns], as in an `Int4Weight`.
      scales: float32[K / size, columns].
      offsets: like `scales`, or None.
      shares: float32[2, K / size, columns], memory for a `narrow` product with offsets.
      step: inputs at a time.
      narrow: numbers and scales are multiplied in bfloat16, with one rounding more.
    """
    depth = x.shape[1]
    size = depth // scales.shape[0]
    if narrow and offsets is not None:
        assert shares is not None, "they need memory"
        scales, offsets = _as_shares(scales, offsets, shares)
    exact = x.dtype == jnp.float32  # the MXU multiplies bfloat16; full float32 precision takes several passes

    def multiply(i: int | jax.Array, length: int) -> None:
        def of_step(each: int) -> Any:
            """Of an axis of which an element is for `each` inputs."""
            start = i * (step // each)
            return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, step // each), length // each)

        factors = [ref for ref in (scales, offsets) if ref is not None]
        if isinstance(i, int):
            group = i * (step // size)
        else:  # a tile of 8 rows or more begins here
            group, factors = 0, [ref.at[of_step(size)] for ref in factors]
        w = _matrix(values.at[of_step(2)], factors, group, size=size, narrow=narrow)
        sums[...] += lax.dot(
            x[:, of_step(1)],
            w.astype(x.dtype),
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        )

    num_steps, rest = divmod(depth, step)
    if num_steps == 1:
        multiply(0, step)
    else:
        lax.fori_loop(0, num_steps, lambda i, _: multiply(i, step), None)
    if rest:
        multiply(num_steps, rest)


def _as_shares(scales: Ref, offsets: Ref, shares: Ref) -> tuple[Ref, Ref]:
    """(scales, offsets / scales): q s + o = (q + o / s) s, which is exact in bfloat16 for whole numbers o / s."""
    scale, offset = scales[...], offsets[...]
    scale = jnp.where(jnp.abs(scale) < jnp.abs(offset) * _SMALLEST_SHARE, offset * _SMALLEST_SHARE, scale)
    shares[0] = scale
    shares[1] = jnp.where(offset == 0, 0.0, offset / scale)
    return shares.at[0], shares.at[1]


def _matrix(values: Ref, factors: Sequence[Ref], group: int, *, size: int, narrow: bool) -> jax.Array:
    """FACTOR times the weights, float32 or, if `narrow`, bfloat16 [2 * bytes, columns].

    `factors` are the scales, and the offsets if there are; `group` is the row of them where `values` begin.
    """
    kind = jnp.bfloat16 if narrow else jnp.float32
    scales, *offsets = factors
    parts = []
    for block in range(values.shape[0] // INT4_ROWS):
        words = pltpu.bitcast(values[block * INT4_ROWS : (block + 1) * INT4_ROWS], jnp.int32)
        for half, aligned in enumerate((words << 4, words)):
            row = group + (2 * block + half) * INT4_ROWS // size
            part = pltpu.bitcast(aligned & _UPPER_HALVES, jnp.int8).astype(kind)
            if not offsets:
                part = part * _repeated(scales, row, kind)
            elif narrow:
                part = (part + _repeated(offsets[0], row, kind, FACTOR)) * _repeated(scales, row, kind)
            else:
                part = part * _repeated(scales, row, kind) + _repeated(offsets[0], row, kind, FACTOR)
            parts.append(part)
    return jnp.concatenate(parts)


def _repeated(ref: Ref, row: int, kind: DTypeLike, factor: int = 1) -> jax.Array:
    """A row of float32, `factor` times, in 32 rows of `kind`."""
    height = SUBLANES * 4 // jnp.dtype(kind).itemsize  # of a tile
    # Of 128 columns at a time, the load itself repeats a row; of more, it would take rotations.
    columns = range(0, ref.shape[1], LANES)
    parts = [jnp.broadcast_to(ref[row : row + 1, column : column + LANES], (height, LANES)) for column in columns]
    tile = jnp.concatenate(parts, axis=1)
    tile = (tile if factor == 1 else tile * factor).astype(kind)
    return jnp.concatenate([tile] * (INT4_ROWS // height))
