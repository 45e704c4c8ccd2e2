"""8-bit KV caches: the numbers of one token and head share a scale, so writing a token does not affect others.

One scale per token needs no calibration, and a cached token never changes, so prefixes can be shared. The scales
of a block form one row per head, with keys along the TPU's lanes: they multiply scores and weights without a transpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int, Num

# int8 is used symmetrically. 448 is the largest finite float8_e4m3fn.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
QUANTIZED_DTYPES = tuple(LARGEST)


@pytree
class QuantizedCache:
    """Keys or values of all layers: number (n, k, b, d) is `values[n, k, b, d] * scales[n, k, b]`.

    Attributes:
      values: int8 or float8_e4m3fn [L*N, K, B, D].
      scales: float32[L*N, K, B], positive where a token was written; [L*N, 2K, B] for rows of two (see `packed`).
    """

    values: Num[Array, "pool K B D"]
    scales: Float32[Array, "pool _ B"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: DTypeLike, *, scales_per_row: int = 1) -> QuantizedCache:
        """An empty cache of `shape` [L*N, K, B, D]."""
        pool, num_kv_heads, block_size, _ = shape
        scales = jnp.zeros((pool, scales_per_row * num_kv_heads, block_size), jnp.float32)
        return QuantizedCache(values=jnp.zeros(shape, dtype), scales=scales)


Cache = jax.Array | QuantizedCache


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a cache of this dtype has scales."""
    return jnp.dtype(dtype).name in LARGEST


def quantize(x: Float[Array, "*shape D"], dtype: DTypeLike) -> tuple[Num[Array, "*shape D"], Float[Array, "*shape"]]:
    """(values [..., D] in `dtype`, scales f32[...]) nearest to `x` [..., D]; zeros get values 0 and scale 1."""
    values, scales = scaled(x.astype(jnp.float32), dtype)
    return values.astype(dtype), scales[..., 0]


def scaled(x: Float[Array, "*shape D"], dtype: DTypeLike) -> tuple[Float[Array, "*shape D"], Float[Array, "*shape 1"]]:
    """(f32[..., D] scaled to the range of `dtype`, f32[..., 1] factors that restore it) for `x` f32[..., D]."""
    limit = LARGEST[jnp.dtype(dtype).name]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scales = jnp.where(largest > 0, largest * (1.0 / limit), 1.0)
    values = jnp.clip(x / scales, -limit, limit)
    return jnp.round(values) if jnp.dtype(dtype) == jnp.int8 else values, scales


def gather_blocks(cache: Cache, blocks: Int[Array, "*blocks"]) -> Float[Array, "*blocks K B D"]:
    """float32[*blocks.shape, K, B, D], the contents of the given blocks of `cache`."""
    if isinstance(cache, QuantizedCache):
        values, scales = cache.values[blocks].astype(jnp.float32), cache.scales[blocks]
        *_, num_kv_heads, block_size, width = values.shape
        parts = scales.shape[-2] // num_kv_heads  # of a row, each with its scale
        if parts == 1:
            return values * scales[..., None]
        scales = scales.reshape(*scales.shape[:-2], num_kv_heads, parts, block_size).swapaxes(-1, -2)
        return (values.reshape(*values.shape[:-1], parts, width // parts) * scales[..., None]).reshape(values.shape)
    return cache[blocks].astype(jnp.float32)
