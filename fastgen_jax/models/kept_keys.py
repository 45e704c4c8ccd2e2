"""Keys and values that later layers read, where a forward pass attends to its own tokens alone.

There are no blocks then. The cache has a row [T, K, D] for each layer whose keys others read, and is carried through the
layers, so that the pass has a derivative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.core import KVCache
from fastgen_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def cache_of_pass(config: ModelConfig, num_tokens: int) -> KVCache:
    """A cache without blocks for a pass over `num_tokens` tokens. It is float32, which holds every key exactly."""
    if not config.kv_sources:
        return KVCache.zeros(
            num_layers=config.num_layers,
            num_blocks=0,
            num_kv_heads=config.cache_kv_heads,
            block_size=1,
            head_dim=config.cache_head_dim,
            dtype=jnp.float32,
            values_in_keys=config.values_in_keys,
        )
    nothing = jnp.zeros((len(_read(config)), num_tokens, config.cache_kv_heads, config.cache_head_dim), jnp.float32)
    return KVCache(k=nothing, v=nothing)


def kept_rows(config: ModelConfig) -> tuple[int, ...]:
    """For each layer the row of its keys, or of those that it reads; one past the end if no other layer reads them."""
    rows = _read(config)
    return tuple(rows.index(source) if source in rows else len(rows) for source in config.kv_sources)


def _read(config: ModelConfig) -> list[int]:
    """The layers whose keys others read."""
    return sorted({source for layer, source in enumerate(config.kv_sources) if source != layer})


def keep(cache: KVCache, key: Float[Array, "T K D"], value: Float[Array, "T K D"], row: Int[Array, ""] | int) -> KVCache:
    """The cache with the keys and values of a layer; a row past the end is dropped."""
    heads = key.shape[1]
    parts = zip(_pools(cache), (key, value), strict=True)
    k, v = (pool.at[row, :, :heads].set(part.astype(pool.dtype), mode="drop") for pool, part in parts)
    return replace(cache, k=k, v=v)


def kept(
    cache: KVCache, like: Float[Array, "T K D"], row: Int[Array, ""] | int
) -> tuple[Float[Array, "T K D"], Float[Array, "T K D"]]:
    """The keys and values of a row, in the shape and dtype of `like`."""
    rows = (jax.lax.dynamic_index_in_dim(pool, row, keepdims=False) for pool in _pools(cache))
    key, value = (part[:, : like.shape[1]].astype(like.dtype) for part in rows)
    return key, value


def _pools(cache: KVCache) -> tuple[jax.Array, jax.Array]:
    assert isinstance(cache.k, jax.Array), "as `cache_of_pass` makes them"
    assert isinstance(cache.v, jax.Array), "as `cache_of_pass` makes them"
    return cache.k, cache.v
