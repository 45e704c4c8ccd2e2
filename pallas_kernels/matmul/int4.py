"""Weights of 4 bits for accelerators."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.matmul.blocks import BlockWeight
from pallas_kernels.matmul.division import Division
from pallas_kernels.pytree import pytree, static

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int, Int8, UInt8

INT4_ROWS = 32
"""Rows of bytes that hold twice as many inputs of an `Int4Weight`."""


@pytree
class Int4Weight:
    """w[k, n] = q[k, n] * scales[k // size, n] + offsets[k // size, n] for q in [-8, 7]; activations stay in floating point.

    The arrays may have leading axes, as in `Int8Weight`. Before it is multiplied, a matrix is rounded to the dtype of the
    activations; TPUs from v6e on also round its scales, and sums with its offsets, to bfloat16.

    Attributes:
      values: uint8[..., K / 2, N]: two's complements of 4 bits. Byte 32 b + i of a column holds q[64 b + i] in its lower
        half and q[64 b + 32 + i] in its upper one, so that both halves of 64 inputs are unpacked without moving a number.
      scales: float16 or float32 [..., K / size, N]; size is a multiple of 32.
      offsets: like `scales`; None: zero.
      layer: as in `Int8Weight`.
      division: as in `Int8Weight`.
    """

    values: UInt8[Array, "*layers bytes N"]
    scales: Float[Array, "*layers blocks N"]
    offsets: Float[Array, "*layers blocks N"] | None = None
    layer: Int[Array, ""] | None = None
    division: Division | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N) of a layer, or (L, K, N) of all layers."""
        *layers, num_bytes, n = self.values.shape if self.layer is None else self.values.shape[1:]
        return *layers, 2 * num_bytes, n

    @property
    def size(self) -> int:
        """Inputs that share a scale."""
        return 2 * self.values.shape[-2] // self.scales.shape[-2]

    def at_layer(self, layer: int | jax.Array) -> Int4Weight:
        """The weight [K, N] of one layer, in the same memory; see `Int8Weight.at_layer`."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))

    def dequantize(self) -> Float32[Array, "*layers K N"]:
        """The matrices that the numbers stand for, of all layers."""

        def of_inputs(array: jax.Array) -> jax.Array:
            return jnp.repeat(array.astype(jnp.float32), self.size, axis=-2)

        wide = unpack_int4(self.values).astype(jnp.float32) * of_inputs(self.scales)
        return wide if self.offsets is None else wide + of_inputs(self.offsets)


def size_of(w: object) -> int | None:
    """Inputs that share a scale, of an `Int4Weight`; None for others."""
    return w.size if isinstance(w, Int4Weight) else None


def unpack_int4(values: UInt8[Array, "*layers bytes N"]) -> Int8[Array, "*layers K N"]:
    """The numbers of an `Int4Weight`."""
    *layers, num_bytes, n = values.shape
    pairs = jax.lax.bitcast_convert_type(values, jnp.int8).reshape(*layers, -1, 1, INT4_ROWS, n)
    halves = jnp.concatenate([(pairs << 4) >> 4, pairs >> 4], axis=-3)
    return halves.reshape(*layers, 2 * num_bytes, n)


class Half(NamedTuple):
    """The numbers q of one half of bytes as kernels get them: `values` is the float32 unit * (q + bias), exactly."""

    unit: int
    bias: int
    values: Float32[Array, "bytes N"]

    def dequantized(
        self, scales: Float32[Array, "... N"], offsets: Float32[Array, "... N"] | None
    ) -> tuple[Float32[Array, "... N"], Float32[Array, "... N"] | None]:
        """(factor, term): q * scales + offsets is values * factor + term; without a term if that is None."""
        if self.bias:
            term = scales * -self.bias
            offsets = term if offsets is None else offsets + term
        return scales * (1 / self.unit) if self.unit != 1 else scales, offsets


def float_halves(values: UInt8[Array, "bytes N"]) -> tuple[Half, Half]:
    """The lower halves, then the upper ones, for kernels.

    GPUs convert integers slowly. A byte becomes the last bits of a float32 between 2^23 and 2^24, whose unit is 1. With
    the signs of both halves inverted it is (q of the upper one + 8) 16 + (q of the lower one + 8), without its last four
    bits the upper half alone. One constant for each operation on bits: an instruction holds no two.
    """
    bits = (values ^ jnp.uint8(0x88)).astype(jnp.int32) | jnp.int32(0x4B000000)
    both, upper = (jax.lax.bitcast_convert_type(part, jnp.float32) for part in (bits, bits & jnp.int32(-16)))
    return Half(1, 8, both - upper), Half(16, 0, upper - jnp.float32(2**23 + 128))


def pack_int4(w: BlockWeight, *, scale_dtype: DTypeLike | None = None) -> Int4Weight:
    """The numbers of 4 bits of `w`, in host arrays. `scale_dtype`: of scales and offsets, at least as wide as theirs.

    Raises ValueError if `w` is something else, or if its inputs are no multiple of 64.
    """
    n, k = w.values.shape
    if w.format.numbers != "uint4" or k % (2 * INT4_ROWS) or w.size % INT4_ROWS:
        raise ValueError(
            f"blocks of {w.size} numbers of {w.format.numbers}, {k} inputs; int4 needs blocks of a multiple of {INT4_ROWS} "
            f"numbers of uint4 and a multiple of {2 * INT4_ROWS} inputs; dequantize the weight"
        )
    signed = (w.values ^ 8).T.reshape(-1, 2, INT4_ROWS, n)  # q - 8 in two's complement
    values = signed[:, 0] | signed[:, 1] << 4
    scales = w.scales.T
    offsets = None if w.offsets is None else (w.offsets.astype(np.float32) + 8 * w.scales.astype(np.float32)).T
    kind = jnp.dtype(scale_dtype or (scales.dtype if offsets is None else np.float32))
    return Int4Weight(
        values=values.reshape(-1, n),  # pyright: ignore[reportArgumentType] (host arrays)
        scales=np.ascontiguousarray(scales, kind),  # pyright: ignore[reportArgumentType]
        offsets=None if offsets is None else np.ascontiguousarray(offsets, kind),  # pyright: ignore[reportArgumentType]
    )
