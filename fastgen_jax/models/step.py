"""What a step computes once for all of its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.cache_groups import CacheGroups, cache_groups
from fastgen_jax.models.cache_rows import for_share, of_shared_rows
from fastgen_jax.models.chunks import in_chunks, num_chunk_rows
from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.division import divided, row_norm_heads
from fastgen_jax.models.kept_keys import kept_rows
from fastgen_jax.models.rope import Rotation, rotation
from fastgen_jax.models.sharding import divide_heads
from fastgen_jax.models.sparse import attended_in_full, check_kv_dtype, indexer_of
from fastgen_jax.models.state_rows import StateRows, state_rows
from pallas_kernels.ragged_attention import (
    Attention,
    RaggedIndex,
    plan_layers,
    ragged_attention,
    rotates_while_writing,
    with_spans,
)
from pallas_kernels.ragged_attention.quantized import Cache
from pallas_kernels.sparse_attention import SparseTokens, sparse_tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32

NO_WINDOW = np.iinfo(np.int32).max
"""Stands for "no window" where other layers have one."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Values shared by all layers of a step."""

    batch: RaggedBatch
    indices: tuple[RaggedIndex, ...]  # for each cache group; without groups, `batch.index` for each sliding window
    kinds: tuple[int, ...]  # which of them each layer uses
    rows: tuple[int, ...]  # of the cache, for each layer
    sharing: tuple[int, ...]  # layers of the kind of each layer that share a row; see `cache_rows`
    side_by_side: tuple[int, ...]  # heads of each layer in one head of the cache
    num_tokens: Int[Array, ""]  # tokens from this index on are padding
    rotations: dict[RopeConfig, Rotation]
    query_scale: Float[Array, " T"] | None  # for models that scale queries by position
    row_norm_heads: tuple[int, int]  # query and key heads over which a norm of all heads averages
    num_blocks: int  # N
    mesh: Mesh | None  # devices that the weights are sharded over; see `sharding`
    attend: Attention  # `ragged_attention` or a replacement for it
    attend_rotates: bool  # whether it is faster to leave the rotation of queries and keys to `attend`
    kept: tuple[int, ...] | None = None  # without blocks: where keys that other layers read are kept, for each layer
    state: StateRows | None = None  # for layers with a state
    sparse: SparseTokens | None = None  # tokens that attend to a choice of keys; None: contexts cannot be so long

    def num_rows(self, rows: Int[Array, " R"] | None) -> Int[Array, ""]:
        """How many of the tokens, or of the sampled `rows`, are not padding."""
        return self.num_tokens if rows is None else self.batch.num_sample_rows


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """What differs between layers, apart from their weights."""

    index: Int[Array, ""] | int
    first: int = 0  # number of the first layer with this body; all of them have the same weights and sizes
    has_attention: bool = True
    has_keys: bool = True  # of its own; otherwise it reads those of another layer
    state_row: Int[Array, ""] | int | None = None  # its number among the layers with a state; None: it has none
    rows: Int[Array, " R"] | None = None  # tokens whose results are needed; None: all
    first_expert: Int[Array, ""] | int | None = None  # where its experts begin in their stacks; None: it has an MLP
    has_mlp: bool = True  # or experts

    @property
    def mixes(self) -> bool:
        """Whether the layer has attention or a state, so that tokens depend on others."""
        return self.has_attention or self.state_row is not None


def take_rows(x: Float[Array, "T ..."], rows: Int[Array, " R"] | None) -> Float[Array, "_ ..."]:
    """x[rows], or all of x."""
    return x if rows is None else jnp.take(x, rows, axis=0)


def prepare_step(
    batch: RaggedBatch,
    kv_cache: KVCache,
    *,
    config: ModelConfig,
    implementation: str | Attention | None,
    mesh: Mesh | None = None,
    spans: Int32[Array, "P 4"] | None = None,
    independent_pieces: bool = False,
) -> Step:
    """Computes the values that depend only on positions, once for all layers; `spans` as for `with_spans`,
    `independent_pieces` as for `plan_layers`."""
    positions = batch.positions if batch.rope_positions is None else batch.rope_positions
    rotations = {rope: rotation(positions, batch.rope_lengths, rope=rope, head_dim=config.head_dim) for rope in config.ropes}
    # Without the barrier XLA moves the cosines into every layer that uses them.
    values = jax.lax.optimization_barrier(tuple(rotations.values()))
    scale = None
    if config.logn_length is not None:  # keeps the entropy of attention as at the trained length
        length = (batch.positions + 1).astype(jnp.float32)
        scale = jnp.maximum(jnp.log(length) / math.log(config.logn_length), 1.0)
    if config.query_growth is not None:
        rule = config.query_growth
        growth = 1.0 + rule.weight * jnp.log1p(((batch.positions + rule.first) // rule.length).astype(jnp.float32))
        scale = growth if scale is None else scale * growth
    attend = implementation if callable(implementation) else partial(ragged_attention, implementation=implementation)
    indices = [batch.index, *batch.windowed]
    num_devices = 1 if mesh is None else mesh.size
    local = config if mesh is None else divided(config, num_devices)
    groups = cache_groups(local, len(indices))
    num_blocks = kv_cache.k.shape[0] // groups.num_rows
    windows, kinds = groups.windows, tuple(group for group, _ in groups.places)
    if not batch.windowed:
        of_layers = config.layer_windows or (None,) * config.num_layers
        windows = tuple(dict.fromkeys(of_layers))
        indices, kinds = indices * len(windows), tuple(map(windows.index, of_layers))
    if config.kv_sources and not callable(implementation):
        indices, windows, kinds = _with_readers(config, indices, windows, kinds, num_blocks * kv_cache.k.shape[2])
    if config.window_chunks:
        indices = _in_chunks(batch, kv_cache, indices, windows, implementation)
        windows = (None,) * len(windows)  # the indices say where chunks begin
    layers, sharing = range(config.num_layers), (1,) * len(indices)
    if config.full_heads is not None and not callable(implementation):
        indices, windows, kinds, sharing = _for_shares(local, groups, indices, windows, kinds, kv_cache.k.shape[2])
        attend = of_shared_rows(attend)
    sparse, indexer = None, indexer_of(config)
    longest = 0 if callable(implementation) else batch.index.block_tables.shape[1] * kv_cache.k.shape[2]
    if indexer is not None and longest > indexer.num_chosen:
        check_kv_dtype(kv_cache.k.dtype, config, longest)
        sparse = jax.lax.optimization_barrier(sparse_tokens(batch.index, batch.positions, indexer.num_chosen))
        indices = [attended_in_full(batch.index, batch.positions, indexer.num_chosen)] * len(indices)
    attend_rotates = False
    if not callable(implementation):
        num_heads, packed = local.num_heads // num_devices, kv_cache.v is None
        seen = partial(_seen, kv_cache.k, num_devices=num_devices)
        attend_rotates = rotates_while_writing(seen(sharing=1), num_heads, packed=packed, implementation=implementation)
        for count in sorted(set(sharing)):
            mine = [i for i, own in enumerate(sharing) if own == count]
            planned = plan_layers(
                [indices[i] for i in mine],
                seen(sharing=count),
                [windows[i] for i in mine],
                num_tokens=batch.positions.shape[0],
                num_heads=num_heads,
                num_blocks=num_blocks * count,
                packed=packed,
                implementation=implementation,
                independent_pieces=independent_pieces,
            )
            for i, index in zip(mine, planned, strict=True):
                indices[i] = index
    attend = attend if mesh is None else divide_heads(attend, mesh)
    return Step(
        batch=batch,
        indices=tuple(indices),
        kinds=kinds,
        rows=tuple(row for _, row in groups.places),
        sharing=tuple(map(local.layers_sharing_row, layers)),
        side_by_side=tuple(map(local.heads_side_by_side, layers)),
        num_tokens=batch.index.query_starts[-1],
        rotations=dict(zip(rotations, values, strict=True)),
        query_scale=scale,
        row_norm_heads=((config.num_heads, config.num_kv_heads) if mesh is None else row_norm_heads(config, mesh.size)),
        num_blocks=num_blocks,
        mesh=mesh,
        attend=attend if spans is None else with_spans(attend, spans),
        attend_rotates=attend_rotates and spans is None,
        kept=kept_rows(config) if config.kv_sources and callable(implementation) else None,
        state=None if config.state is None else state_rows(batch),
        sparse=sparse,
    )


def _seen(cache: Cache, *, sharing: int, num_devices: int) -> Cache:
    """Shapes of the cache that a device's kernel sees in layers that share their rows."""

    def of_pool(pool: jax.Array) -> jax.ShapeDtypeStruct:
        blocks, heads, *rest = pool.shape
        return jax.ShapeDtypeStruct((blocks * sharing, heads // num_devices // sharing, *rest), pool.dtype)

    return jax.tree.map(of_pool, cache)


def _for_shares(
    config: ModelConfig,
    groups: CacheGroups,
    indices: list[RaggedIndex],
    windows: tuple[int | None, ...],
    kinds: tuple[int, ...],
    block_size: int,
) -> tuple[list[RaggedIndex], tuple[int | None, ...], tuple[int, ...], tuple[int, ...]]:
    """An index for each kind of layer and place in a shared row, and how many layers share it."""
    sharing = map(config.layers_sharing_row, range(config.num_layers))
    places = list(zip(kinds, groups.shares, sharing, strict=True))
    used = list(dict.fromkeys(places))
    found = [for_share(indices[kind], share, count, block_size=block_size) for kind, share, count in used]
    return found, tuple(windows[kind] for kind, _, _ in used), tuple(map(used.index, places)), tuple(c for _, _, c in used)


def _with_readers(
    config: ModelConfig,
    indices: list[RaggedIndex],
    windows: tuple[int | None, ...],
    kinds: tuple[int, ...],
    num_slots: int,
) -> tuple[list[RaggedIndex], tuple[int | None, ...], tuple[int, ...]]:
    """Each index once more, for layers that read the keys of others: what they write is dropped."""
    readers = [replace(index, kv_slots=jnp.full_like(index.kv_slots, num_slots)) for index in indices]
    reads = [source != layer for layer, source in enumerate(config.kv_sources)]
    kinds = tuple(kind + len(indices) * is_reader for kind, is_reader in zip(kinds, reads, strict=True))
    return [*indices, *readers], windows * 2, kinds


def _in_chunks(
    batch: RaggedBatch,
    kv_cache: KVCache,
    indices: list[RaggedIndex],
    windows: tuple[int | None, ...],
    implementation: str | Attention | None,
) -> list[RaggedIndex]:
    """`indices` with a row for each chunk that tokens are in, all of the same shape; a window is the size of a chunk.

    They are returned as they are if no context can be longer than a chunk.
    """
    sizes = [size for size in windows if size is not None]
    if not sizes:
        return indices
    num_tokens, block_size = batch.positions.shape[0], kv_cache.k.shape[2]
    if callable(implementation):
        if num_tokens > min(sizes):
            raise ValueError(
                f"this model attends within chunks of {min(sizes)} tokens, which is not supported without a KV cache for "
                f"more tokens than that in a batch; got {num_tokens}"
            )
        return indices
    if batch.index.block_tables.shape[1] * block_size <= min(sizes):
        return indices
    rows = num_chunk_rows(batch.index.context_lens.shape[0], num_tokens, min(sizes))
    everything = NO_WINDOW // block_size * block_size
    return [
        in_chunks(index, batch.positions, everything if size is None else size, block_size=block_size, num_rows=rows)
        for index, size in zip(indices, windows, strict=True)
    ]
