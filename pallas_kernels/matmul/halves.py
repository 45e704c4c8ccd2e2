"""Products with int8 weights on GPUs of compute capability 7.5, which multiply int8 by int8 but have no kernel of ours.

XLA would convert the weights of every layer to 16 bits, in memory. Rows of activations become two int8 halves instead,

    x[t] = factor[t] * (256 * high[t] + low[t])      16 bits, rounded once; the largest number of a row becomes 32,639

so that one product of twice the rows reads the weights where they are, and its sums are exact. They are to be stored [N, K]:
cuBLAS multiplies int8 with the inputs of both operands adjacent, and XLA would transpose them in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int8

CAPABILITY = "7.5"  # T4, RTX 20, Quadro RTX: cuBLAS needs tensor cores that multiply int8, and newer GPUs have kernels
_BASE, _LARGEST_HALF = 256, 127  # high halves are in [-127, 127], low ones in [-128, 127]
_LARGEST = _BASE * _LARGEST_HALF + _LARGEST_HALF
MOST_INPUTS = 2**17  # sums of products of -128 with 127 stay in int32
_UNIT = 4  # of all sizes, for cuBLAS


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a matrix [..., K, N] may be multiplied."""
    depth, columns = shape[-2:]
    return depth % _UNIT == 0 and columns % _UNIT == 0 and depth <= MOST_INPUTS


def is_used(shape: tuple[int, ...], capability: str | None = None) -> bool:
    """Whether int8 matrices of this shape are stored for these products on a GPU of this capability.

    None: that of the GPU that the program is lowered for.
    """
    return fits(shape) and (capability or gpu_target.compute_capability()) == CAPABILITY


def half_rows(
    x: Float[Array, "T K"],
) -> tuple[Int8[Array, "T K"], Int8[Array, "T K"], Float32[Array, "T one"]]:
    """(high, low, factors) with x nearest to factors * (256 * high + low)."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    factors = jnp.maximum(largest, 1e-30) * (1.0 / _LARGEST)  # a normal number, also of a row of zeros
    whole = jnp.clip(jnp.round(wide / factors), -_LARGEST, _LARGEST).astype(jnp.int32)
    high = jnp.right_shift(whole + _BASE // 2, 8)
    return high.astype(jnp.int8), (whole - _BASE * high).astype(jnp.int8), factors


def multiply(x: Float[Array, "T K"], values: Int8[Array, "N K"]) -> Float32[Array, "T N"]:
    """x, rounded to 16 bits a row, times the transposed `values`. The sums are exact, and rounded once to float32."""
    depth = x.shape[1]
    if depth > MOST_INPUTS:
        raise ValueError(f"x has {depth} inputs, but int32 sums of halves hold {MOST_INPUTS}; pass the weights as [K, N]")
    high, low, factors = half_rows(x)
    rows = jnp.concatenate([high, low])
    rows = jnp.pad(rows, [(0, -len(rows) % _UNIT), (0, 0)])
    sums = jax.lax.dot_general(rows, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    # Else XLA might have the library do more than the product, and copy the layer's weights out of their stack for it.
    sums = jax.lax.optimization_barrier(sums)
    of_high, of_low = sums[: len(x)], sums[len(x) : 2 * len(x)]
    return (of_high.astype(jnp.float32) * _BASE + of_low.astype(jnp.float32)) * factors
