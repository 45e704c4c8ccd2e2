"""Rows of float32 in the dtype of a weight, for GPUs: with two dtypes XLA would convert the weight, which is a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

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
