"""Packed caches, which hold the key and the value of a token and head in one row.

    row      | key, D numbers | value, D numbers |      of head h
    scales   of an 8-bit cache: row 2h has those of its keys, row 2h + 1 those of its values

A TPU pads rows to 128 numbers. With heads of 64, key and value fill such a row together; apart, each would be half padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention.arguments import Scoring
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache, quantize

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num


def is_packed(v_cache: Cache | None, scoring: Scoring) -> bool:
    """Whether the other cache of a call is packed: there is none of values, and values are not parts of their keys."""
    return v_cache is None and scoring.latents is None


def pack(k: Num[Array, "*shape D"], v: Num[Array, "*shape D"]) -> Num[Array, "*shape _"]:
    """Rows of 2D numbers."""
    return jnp.concatenate([k, v], axis=-1)


def pack_caches(k_cache: Cache, v_cache: Cache) -> Cache:
    """The packed cache [L*N, K, B, 2D] with the contents of two caches [L*N, K, B, D]."""
    if isinstance(k_cache, QuantizedCache) and isinstance(v_cache, QuantizedCache):
        pool, num_kv_heads, block_size, _ = k_cache.shape
        scales = jnp.stack([k_cache.scales, v_cache.scales], axis=2)  # [L*N, K, 2, B]
        return QuantizedCache(
            values=pack(k_cache.values, v_cache.values), scales=scales.reshape(pool, 2 * num_kv_heads, block_size)
        )
    assert not isinstance(k_cache, QuantizedCache)
    assert not isinstance(v_cache, QuantizedCache)
    return pack(k_cache, v_cache)


def unpack_cache(cache: Cache) -> tuple[Cache, Cache]:
    """The contents of a packed cache as two caches: the inverse of `pack_caches`."""
    if isinstance(cache, QuantizedCache):
        keys, values = jnp.split(cache.values, 2, axis=-1)
        return (
            QuantizedCache(values=keys, scales=cache.scales[:, 0::2]),
            QuantizedCache(values=values, scales=cache.scales[:, 1::2]),
        )
    keys, values = jnp.split(cache, 2, axis=-1)
    return keys, values


def quantize_packed(
    rows: Float[Array, "T K D2"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "T K D2"], Float[Array, "T K2"]]:
    """(values, scales) of packed rows [T, K, 2D]: keys and values have scales of their own, [T, 2K]."""
    num_tokens, num_kv_heads, width = rows.shape
    values, scales = quantize(rows.reshape(num_tokens, 2 * num_kv_heads, width // 2), dtype)
    return values.reshape(rows.shape), scales
