"""What a step computes once for all of its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.cache_groups import cache_groups
from fastgen_jax.models.cache_rows import of_shared_rows
from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.division import divided, row_norm_heads
from fastgen_jax.models.kept_keys import kept_rows
from fastgen_jax.models.layer_kinds import (
    cache_of_device,
    for_shared_rows,
    layer_kinds,
    planned,
    with_readers,
    within_chunks,
)
from fastgen_jax.models.mla import latents_of
from fastgen_jax.models.rope import Rotation, rotation
from fastgen_jax.models.sharding import divide_heads
from fastgen_jax.models.sparse import attended_in_full, check_kv_dtype, indexer_of
from fastgen_jax.models.state_rows import StateRows, state_rows
from pallas_kernels.ragged_attention import (
    Attention,
    RaggedIndex,
    ragged_attention,
    rotates_while_writing,
    with_spans,
)
from pallas_kernels.sparse_attention import SparseTokens, sparse_tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32


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
    stacked_rotations: Rotation | None  # those of `config.rope_kinds`; None: all layers have the same
    query_scale: Float[Array, " T"] | None  # for models that scale queries by position
    row_norm_heads: tuple[int, int]  # query and key heads over which a norm of all heads averages
    num_blocks: int  # N
    mesh: Mesh | None  # devices that the weights are sharded over; see `sharding`
    attend: Attention  # `ragged_attention` or a replacement for it
    sums_in_order: bool  # whether what they computed is added up in the same order for every element
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


def _stacked(rotations: dict[RopeConfig, Rotation], config: ModelConfig) -> Rotation | None:
    """`Step.stacked_rotations`. A layer without rotation rotates by an angle of zero."""
    if len(config.rope_kinds) < 2 or len({cos.shape for cos, _ in rotations.values()}) > 1:
        return None
    cos, sin = next(iter(rotations.values()))
    none = (jnp.ones_like(cos), jnp.zeros_like(sin))
    tables = [none if rope is None else rotations[rope] for rope in config.rope_kinds]
    cosines, sines = (jnp.stack(table) for table in zip(*tables, strict=True))
    return cosines, sines


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
    sums_in_order: bool = False,
) -> Step:
    """Computes the values that depend only on positions, once for all layers; `spans` as for `with_spans`,
    `independent_pieces` as for `plan_layers`, `sums_in_order` as for `Execution`."""
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
    kernel = None if callable(implementation) else implementation
    has_blocks = not callable(implementation)  # otherwise whole sequences are in the batch, and need no cache
    attend = implementation if callable(implementation) else partial(ragged_attention, implementation=kernel)
    block_size, num_devices = kv_cache.k.shape[2], 1 if mesh is None else mesh.size
    local = config if mesh is None else divided(config, num_devices)
    groups = cache_groups(local, 1 + len(batch.windowed))
    num_blocks = kv_cache.k.shape[0] // groups.num_rows
    kinds = layer_kinds(batch, groups, config)
    if config.kv_sources and has_blocks:
        kinds = with_readers(kinds, config, num_blocks * block_size)
    if config.window_chunks:
        kinds = within_chunks(kinds, batch, block_size if has_blocks else None)
    if config.full_heads is not None and has_blocks:
        kinds, attend = for_shared_rows(kinds, local, groups, block_size), of_shared_rows(attend)
    sparse, indexer = None, indexer_of(config)
    longest = batch.index.block_tables.shape[1] * block_size if has_blocks else 0
    if indexer is not None and longest > indexer.num_chosen:
        check_kv_dtype(kv_cache.k.dtype, config, longest)
        sparse = jax.lax.optimization_barrier(sparse_tokens(batch.index, batch.positions, indexer.num_chosen))
        in_full = attended_in_full(batch.index, batch.positions, indexer.num_chosen)
        kinds = replace(kinds, indices=(in_full,) * len(kinds.indices))
    attend_rotates = False
    if has_blocks:
        num_heads, of_device = local.num_heads // num_devices, cache_of_device(kv_cache, num_devices)
        if config.mla is None:
            attend_rotates = rotates_while_writing(of_device, num_heads, packed=kv_cache.packed, implementation=kernel)
        kinds = planned(
            kinds,
            kv_cache,
            num_tokens=batch.positions.shape[0],
            num_heads=num_heads,
            num_blocks=num_blocks,
            num_devices=num_devices,
            latents=None if kv_cache.packed else latents_of(config.mla),
            implementation=kernel,
            independent_pieces=independent_pieces,
        )
    attend = attend if mesh is None else divide_heads(attend, mesh)
    return Step(
        batch=batch,
        indices=tuple(kinds.indices),
        kinds=kinds.of_layers,
        rows=tuple(row for _, row in groups.places),
        sharing=tuple(map(local.layers_sharing_row, range(config.num_layers))),
        side_by_side=tuple(map(local.heads_side_by_side, range(config.num_layers))),
        num_tokens=batch.index.query_starts[-1],
        rotations=(given := dict(zip(rotations, values, strict=True))),
        stacked_rotations=_stacked(given, config),
        query_scale=scale,
        row_norm_heads=((config.num_heads, config.num_kv_heads) if mesh is None else row_norm_heads(config, mesh.size)),
        num_blocks=num_blocks,
        mesh=mesh,
        sums_in_order=sums_in_order and num_devices > 1,
        attend=attend if spans is None else with_spans(attend, spans),
        attend_rotates=attend_rotates and spans is None,
        kept=kept_rows(config) if config.kv_sources and not has_blocks else None,
        state=None if config.state is None else state_rows(batch),
        sparse=sparse,
    )
