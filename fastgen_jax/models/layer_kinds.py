"""Kinds of layers: those of one kind attend by the same index, which is made once a step.

Most models have one kind. Others have one for each sliding window or cache group, for layers that read the keys of others,
and for each place in a row of the cache that layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.cache_groups import CacheGroups
from fastgen_jax.models.cache_rows import for_share
from fastgen_jax.models.chunks import in_chunks, num_chunk_rows
from fastgen_jax.models.config import ModelConfig
from pallas_kernels.ragged_attention import Latents, RaggedIndex, plan_layers
from pallas_kernels.ragged_attention.quantized import Cache

NO_WINDOW = np.iinfo(np.int32).max
"""Stands for "no window" where other layers have one."""


@dataclass(frozen=True, kw_only=True)
class LayerKinds:
    """The kinds of layers in a step."""

    indices: Sequence[RaggedIndex]  # of each kind
    windows: tuple[int | None, ...]  # the sliding window of each kind
    sharing: tuple[int, ...]  # how many layers of each kind share a row of the cache
    of_layers: tuple[int, ...]  # the kind of each layer


def layer_kinds(batch: RaggedBatch, groups: CacheGroups, config: ModelConfig) -> LayerKinds:
    """One kind for each cache group; without groups, one for each sliding window."""
    if batch.windowed:
        indices, windows = (batch.index, *batch.windowed), groups.windows
        of_layers = tuple(group for group, _ in groups.places)
    else:
        of_each = config.layer_windows or (None,) * config.num_layers
        windows = tuple(dict.fromkeys(of_each))
        indices, of_layers = (batch.index,) * len(windows), tuple(map(windows.index, of_each))
    return LayerKinds(indices=indices, windows=windows, sharing=(1,) * len(indices), of_layers=of_layers)


def with_readers(kinds: LayerKinds, config: ModelConfig, num_slots: int) -> LayerKinds:
    """Each kind once more, for layers that read the keys of others: what they write is dropped."""
    readers = [replace(index, kv_slots=jnp.full_like(index.kv_slots, num_slots)) for index in kinds.indices]
    reads = [source != layer for layer, source in enumerate(config.kv_sources)]
    return LayerKinds(
        indices=[*kinds.indices, *readers],
        windows=kinds.windows * 2,
        sharing=kinds.sharing * 2,
        of_layers=tuple(kind + len(readers) * is_reader for kind, is_reader in zip(kinds.of_layers, reads, strict=True)),
    )


def within_chunks(kinds: LayerKinds, batch: RaggedBatch, block_size: int | None) -> LayerKinds:
    """For windows that are chunks of the text: indices with a row for each chunk, all of the same shape, and no windows.

    Without blocks, or if no context can be longer than a chunk, the indices stay as they are.
    """
    sizes = [size for size in kinds.windows if size is not None]
    without = replace(kinds, windows=(None,) * len(kinds.windows))  # the indices say where chunks begin
    if not sizes:
        return without
    num_tokens = batch.positions.shape[0]
    if block_size is None:
        if num_tokens > min(sizes):
            raise ValueError(
                f"this model attends within chunks of {min(sizes)} tokens, which is not supported without a KV cache for "
                f"more tokens than that in a batch; got {num_tokens}"
            )
        return without
    if batch.index.block_tables.shape[1] * block_size <= min(sizes):
        return without
    rows = num_chunk_rows(batch.index.context_lens.shape[0], num_tokens, min(sizes))
    everything = NO_WINDOW // block_size * block_size
    indices = [
        in_chunks(index, batch.positions, everything if size is None else size, block_size=block_size, num_rows=rows)
        for index, size in zip(kinds.indices, kinds.windows, strict=True)
    ]
    return replace(without, indices=indices)


def for_shared_rows(kinds: LayerKinds, config: ModelConfig, groups: CacheGroups, block_size: int) -> LayerKinds:
    """A kind for each place in a row that layers share."""
    sharing = map(config.layers_sharing_row, range(config.num_layers))
    places = list(zip(kinds.of_layers, groups.shares, sharing, strict=True))
    used = list(dict.fromkeys(places))
    return LayerKinds(
        indices=[for_share(kinds.indices[kind], share, count, block_size=block_size) for kind, share, count in used],
        windows=tuple(kinds.windows[kind] for kind, _, _ in used),
        sharing=tuple(count for _, _, count in used),
        of_layers=tuple(map(used.index, places)),
    )


def planned(
    kinds: LayerKinds,
    kv_cache: KVCache,
    *,
    num_tokens: int,
    num_heads: int,
    num_blocks: int,
    num_devices: int,
    latents: Latents | None,
    implementation: str | None,
    independent_pieces: bool,
) -> LayerKinds:
    """`kinds` with what attention derives from their indices; see `plan_layers`. `num_heads` are those of a device."""
    indices = list(kinds.indices)
    for sharing in sorted(set(kinds.sharing)):
        mine = [kind for kind, own in enumerate(kinds.sharing) if own == sharing]
        plans = plan_layers(
            [indices[kind] for kind in mine],
            cache_of_device(kv_cache, num_devices, sharing=sharing),
            [kinds.windows[kind] for kind in mine],
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_blocks=num_blocks * sharing,
            packed=kv_cache.packed,
            latents=latents,
            implementation=implementation,
            independent_pieces=independent_pieces,
        )
        for kind, plan in zip(mine, plans, strict=True):
            indices[kind] = plan
    return replace(kinds, indices=indices)


def cache_of_device(kv_cache: KVCache, num_devices: int, *, sharing: int = 1) -> Cache:
    """The shapes of the keys that a device's kernel sees, in layers that share their rows."""

    def of_pool(pool: jax.Array) -> jax.ShapeDtypeStruct:
        blocks, heads, *rest = pool.shape
        return jax.ShapeDtypeStruct((blocks * sharing, heads // num_devices // sharing, *rest), pool.dtype)

    return jax.tree.map(of_pool, kv_cache.k)
