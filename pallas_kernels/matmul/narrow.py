"""Rows of activations in the dtype of a weight: products of two equal dtypes are the fast ones, and need no other weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int8

LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn
LARGEST_INT8 = 127  # -128 is not used, so that x and -x become q and -q
_LARGEST_POWER = 10  # sums of products of numbers up to 2^10 with weights stay far below the largest float32


def is_narrowed(x_dtype: DTypeLike, w_dtype: DTypeLike) -> bool:
    """Whether `linear` multiplies `float16_rows` of float32 activations: with float16 weights on a GPU."""
    return x_dtype == jnp.float32 and w_dtype == jnp.float16 and gpu_target.is_gpu()


def float16_rows(x: Float32[Array, "*rows K"]) -> tuple[Float[Array, "*rows K"], Float32[Array, "*rows one"]]:
    """(float16[..., K], powers of two f32[..., 1]) whose product is `x` rounded to 11 bits.

    The largest number of a row becomes 2^9 to 2^10, so that none overflows, and those below 2^-24 of it become less exact.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    exponent = jnp.frexp(largest)[1] - _LARGEST_POWER
    return jnp.ldexp(x, -exponent).astype(jnp.float16), jnp.ldexp(jnp.float32(1), exponent)


def float8_rows(x: Float[Array, "*rows K"]) -> tuple[Float[Array, "*rows K"], Float32[Array, "*rows one"]]:
    """(float8_e4m3fn[..., K], f32[..., 1]) whose product is nearest to `x`: the largest number of a row becomes 448."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    factors = jnp.where(largest > 0, largest * (1.0 / LARGEST_FLOAT8), 1.0)
    return jnp.clip(wide / factors, -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(jnp.float8_e4m3fn), factors


def int8_rows(x: Float[Array, "*rows K"]) -> tuple[Int8[Array, "*rows K"], Float32[Array, "*rows one"]]:
    """(int8[..., K], f32[..., 1]) whose product is nearest to `x`: the largest number of a row becomes 127 or -127."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    factors = jnp.maximum(largest, 1e-30) * (1.0 / LARGEST_INT8)  # a normal number, also of a row of zeros
    return jnp.clip(jnp.round(wide / factors), -LARGEST_INT8, LARGEST_INT8).astype(jnp.int8), factors
