"""The memory in which a model keeps what it needs of the tokens of its sequences."""

from __future__ import annotations

from dataclasses import replace

from jax.typing import DTypeLike

from fastgen_jax.core import KVCache
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.states import state_shapes


def empty_cache(
    config: ModelConfig, *, num_rows: int, num_blocks: int, block_size: int, num_slots: int, dtype: DTypeLike, platform: str
) -> KVCache:
    """A cache of zeros for `num_slots` running sequences, whose keys and values have `dtype`.

    `num_rows` are the layers of a cache group.
    """
    cache = KVCache.zeros(
        num_layers=num_rows,
        num_blocks=num_blocks,
        num_kv_heads=config.cache_kv_heads,
        block_size=block_size,
        head_dim=config.cache_head_dim,
        dtype=dtype,
        platform=platform,
        values_in_keys=config.values_in_keys,
    )
    return replace(cache, states=state_shapes(config, platform).zeros(num_slots))
