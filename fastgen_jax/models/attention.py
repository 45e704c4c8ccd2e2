"""The attention block of a layer, between its norm and the residual stream."""

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
from fastgen_jax.models.cache_groups import cache_groups
from fastgen_jax.models.chunks import in_chunks, num_chunk_rows
from fastgen_jax.models.columns import split_columns
from fastgen_jax.models.config import ModelConfig, RopeConfig, same_for_all
from fastgen_jax.models.division import divided, row_norm_heads
from fastgen_jax.models.layers import norm, project
from fastgen_jax.models.mla import expand_values, latent_heads
from fastgen_jax.models.rope import Rotation, rotation
from fastgen_jax.models.sharding import divide_heads
from fastgen_jax.models.sparse import (
    attend_to_chosen,
    attended_in_full,
    check_kv_dtype,
    index_keys,
    index_queries,
    indexer_of,
)
from fastgen_jax.models.state_rows import StateRows, state_rows
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.norm import rms_norm
from pallas_kernels.ragged_attention import (
    Attention,
    CacheLayer,
    RaggedIndex,
    Scoring,
    plan_layers,
    ragged_attention,
    with_spans,
)
from pallas_kernels.rotary import rotary, rotate
from pallas_kernels.sparse_attention import IndexQueries, SparseTokens, sparse_tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32

_NO_WINDOW = np.iinfo(np.int32).max  # stands for "no window" where other layers have one


@dataclass(frozen=True, kw_only=True)
class Step:
    """Values shared by all layers of a step."""

    batch: RaggedBatch
    indices: tuple[RaggedIndex, ...]  # for each cache group; without groups, `batch.index` for each sliding window
    kinds: tuple[int, ...]  # which of them each layer uses
    rows: tuple[int, ...]  # of the cache, for each layer
    num_tokens: Int[Array, ""]  # tokens from this index on are padding
    rotations: dict[RopeConfig, Rotation]
    query_scale: Float[Array, " T"] | None  # for models that scale queries by position
    row_norm_heads: tuple[int, int]  # query and key heads over which a norm of all heads averages
    num_blocks: int  # N
    mesh: Mesh | None  # devices that the weights are sharded over; see `sharding`
    attend: Attention  # `ragged_attention` or a replacement for it
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
    groups = cache_groups(config, len(indices))
    num_blocks, num_devices = kv_cache.k.shape[0] // groups.num_rows, 1 if mesh is None else mesh.size
    local = config if mesh is None else divided(config, num_devices)
    windows, kinds = groups.windows, tuple(group for group, _ in groups.places)
    if not batch.windowed:
        of_layers = config.layer_windows or (None,) * config.num_layers
        windows = tuple(dict.fromkeys(of_layers))
        indices, kinds = indices * len(windows), tuple(map(windows.index, of_layers))
    if config.kv_sources:
        if callable(implementation):
            raise ValueError(
                f"a {config.family} model, whose layers read the keys of others, cannot run without a KV cache; use an "
                "engine"
            )
        indices, windows, kinds = _with_readers(config, indices, windows, kinds, num_blocks * kv_cache.k.shape[2])
    if config.window_chunks:
        indices = _in_chunks(batch, kv_cache, indices, windows, implementation)
        windows = (None,) * len(windows)  # the indices say where chunks begin
    sparse, indexer = None, indexer_of(config)
    longest = 0 if callable(implementation) else batch.index.block_tables.shape[1] * kv_cache.k.shape[2]
    if indexer is not None and longest > indexer.num_chosen:
        check_kv_dtype(kv_cache.k.dtype, config, longest)
        sparse = jax.lax.optimization_barrier(sparse_tokens(batch.index, batch.positions, indexer.num_chosen))
        indices = [attended_in_full(batch.index, batch.positions, indexer.num_chosen)] * len(indices)
    if not callable(implementation):
        indices = plan_layers(
            indices,
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // num_devices, *x.shape[2:]), x.dtype), kv_cache.k
            ),
            windows,
            num_tokens=batch.positions.shape[0],
            num_heads=local.num_heads // num_devices,
            num_blocks=num_blocks,
            packed=kv_cache.v is None,
            implementation=implementation,
            independent_pieces=independent_pieces,
        )
    attend = attend if mesh is None else divide_heads(attend, mesh)
    return Step(
        batch=batch,
        indices=tuple(indices),
        kinds=kinds,
        rows=tuple(row for _, row in groups.places),
        num_tokens=batch.index.query_starts[-1],
        rotations=dict(zip(rotations, values, strict=True)),
        query_scale=scale,
        row_norm_heads=((config.num_heads, config.num_kv_heads) if mesh is None else row_norm_heads(config, mesh.size)),
        num_blocks=num_blocks,
        mesh=mesh,
        attend=attend if spans is None else with_spans(attend, spans),
        state=None if config.state is None else state_rows(batch),
        sparse=sparse,
    )


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
    everything = _NO_WINDOW // block_size * block_size
    return [
        in_chunks(index, batch.positions, everything if size is None else size, block_size=block_size, num_rows=rows)
        for index, size in zip(indices, windows, strict=True)
    ]


def attention(
    x: Float[Array, "T E"],
    w: LayerWeights,
    cache: KVCache,
    step: Step,
    call: LayerCall,
    *,
    config: ModelConfig,
    residual: Float[Array, "rows E"] | None,
) -> tuple[Float[Array, "rows E"], KVCache]:
    """Attention of `x` in one layer (+ residual), and the cache with the keys and values of this step added.

    The rows are all tokens, or those that the layer is called for.
    """
    d, index, rows = config.head_dim, call.index, call.rows
    gate = None
    if config.mla is None:
        # [T, (H + 2K) D], and with a gate H * D more
        x = project(x, w, "qkv" if call.has_keys else "q", num_rows=step.num_tokens)
        if config.attention_gate:
            widths = (x.shape[1] - config.num_heads * d, config.num_heads * d)
            x, gate = split_columns(x, widths, 1 if step.mesh is None else step.mesh.size)
    turn, asked = _rotation_of(step, config, index), None
    if config.mla is None:
        q, key, value = (_heads if call.has_keys else _queries)(x, w, step, turn, config=config)
    else:
        q, key, value, asked = _latent_heads(x, w, step, turn, config=config)
    if config.qk_norm == "unit":
        q, key = _unit_norms(q, key, step, config, index)
    if step.query_scale is not None:
        scale = step.query_scale
        if config.query_growth is not None and config.query_growth.unrotated_only:
            scale = jnp.where(_rotates(config, index), 1.0, scale)
        q = (q.astype(jnp.float32) * scale[:, None, None]).astype(q.dtype)
    if config.attention_scale_by_layer:
        q = (q.astype(jnp.float32) / (jnp.asarray(index, jnp.float32) + 1.0)).astype(q.dtype)
    if cache.head_dim != d:  # heads are zero-padded in the cache, which does not change a dot product
        q, key, value = (jnp.pad(part, ((0, 0), (0, 0), (0, cache.head_dim - d))) for part in (q, key, value))
    if step.mesh is None and cache.k.shape[1] != key.shape[1]:  # each serves fewer queries
        key, value = (jnp.repeat(part, cache.k.shape[1] // part.shape[1], axis=1) for part in (key, value))
    layer, scoring = CacheLayer(number=_row_of(step, index), num_blocks=step.num_blocks), _scoring_of(config, w, index)
    out, k_cache, v_cache = step.attend(q, key, value, cache.k, cache.v, _index_of(step, index), layer, scoring)
    cache = replace(cache, k=k_cache, v=v_cache)
    if step.sparse is not None:
        assert config.mla is not None, "only latent attention has an indexer"
        places = {"rank": config.mla.kv_rank, "scale": scoring.scale, "mesh": step.mesh}
        out, cache = attend_to_chosen(q, out, asked, cache, step.batch.index, layer, step.sparse, **places)
    out = take_rows(out[..., :d], rows)
    if config.mla is not None:
        out = expand_values(out, w, config=config.mla, num_tokens=step.num_rows(rows))
    out = out.reshape(out.shape[0], -1)
    if config.attention_multiplier != 1.0:
        out = out * config.attention_multiplier
    if gate is not None:
        out = out * jax.nn.sigmoid(take_rows(gate, rows))
    return project(out, w, "o", residual=residual, num_rows=step.num_rows(rows)), cache


def _latent_heads(
    x: Float[Array, "T E"], w: LayerWeights, step: Step, turn: Rotation | None, *, config: ModelConfig
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"], IndexQueries | None]:
    """`_heads` of latent attention, for its input, and what the indexer of this layer asks if it has one to ask."""
    mla = config.mla
    assert mla is not None
    assert turn is not None, "latent attention rotates in every layer"
    used: dict[str, Int[Array, ""]] = {"num_tokens": step.num_tokens}
    q, key, q_latent = latent_heads(x, w, turn, config=mla, num_heads=config.num_heads, **used)
    value, asked = key, None
    if step.sparse is not None and "index_k" in w:
        assert mla.indexer is not None
        assert q_latent is not None, "checked by MLAConfig"
        beside = index_keys(x, w, turn, **used)
        unused = jnp.zeros((x.shape[0], 1, mla.beside_latent - beside.shape[-1]), x.dtype)
        value = jnp.concatenate([key[..., : mla.kv_rank], beside.astype(x.dtype), unused], axis=-1)
        asked = index_queries(x, q_latent, w, turn, config=mla.indexer, **used)
    if step.mesh is not None:  # every device has a copy
        shape = (x.shape[0], config.num_kv_heads, config.head_dim)
        key, value = jnp.broadcast_to(key, shape), jnp.broadcast_to(value, shape)
    return q, key, value, asked


def _heads(
    x: Float[Array, "T _"], w: LayerWeights, step: Step, turn: Rotation | None, *, config: ModelConfig
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
    """Queries, keys and values, normalized and rotated as the config says; `x` is the projection to all of them."""
    h, k, d = config.num_heads, config.num_kv_heads, config.head_dim
    norm_first = config.qk_norm not in (None, "unit") and not config.qk_norm_rotated
    if step.mesh is not None:  # one fused pass over all heads would gather them on every device
        q, key, value = (part.reshape(x.shape[0], -1, d) for part in split_columns(x, (h * d, k * d, k * d), step.mesh.size))
        if norm_first:
            q, key = _qk_norms(q, key, w, step, config)
        q, key, value = (_clipped(part, config) for part in (q, key, _v_norm(value, step, config)))
        if turn is not None:
            q, key = rotate(q, *turn), rotate(key, *turn)
        return (*_qk_norms(q, key, w, step, config), value) if config.qk_norm_rotated else (q, key, value)
    qkv = x.reshape(-1, h + 2 * k, d)
    if norm_first:
        q, key = _qk_norms(qkv[:, :h], qkv[:, h : h + k], w, step, config)
        qkv = jnp.concatenate([q, key, _v_norm(qkv[:, h + k :], step, config)], axis=1)
    qkv = _clipped(qkv, config)
    q, key, value = (qkv[:, :h], qkv[:, h : h + k], qkv[:, h + k :]) if turn is None else rotary(qkv, *turn, num_heads=h)
    return (*_qk_norms(q, key, w, step, config), value) if config.qk_norm_rotated else (q, key, value)


def _queries(
    x: Float[Array, "T HD"], w: LayerWeights, step: Step, turn: Rotation | None, *, config: ModelConfig
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
    """As `_heads`, of a layer that reads the keys and values of another one: zeros take their place, and are dropped."""
    q = x.reshape(x.shape[0], -1, config.head_dim)
    q = _qk_norm(q, w, "q_norm", step, config) if config.qk_norm is not None else q
    nothing = jnp.zeros((x.shape[0], config.num_kv_heads, config.head_dim), q.dtype)
    return q if turn is None else rotate(q, *turn), nothing, nothing


def _v_norm(value: Float[Array, "T K D"], step: Step, config: ModelConfig) -> Float[Array, "T K D"]:
    """Values, normalized in each head if the model does so."""
    if not config.v_norm:
        return value
    return rms_norm(value, jnp.ones(config.head_dim, value.dtype), eps=config.norm_eps, num_rows=step.num_tokens)


def _qk_norms(q: jax.Array, key: jax.Array, w: LayerWeights, step: Step, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Queries and keys, each with its norm."""
    return _qk_norm(q, w, "q_norm", step, config), _qk_norm(key, w, "k_norm", step, config)


def _qk_norm(x: jax.Array, w: LayerWeights, name: str, step: Step, config: ModelConfig) -> jax.Array:
    """Queries or keys, normalized per head or over all heads together."""
    if config.qk_norm == "row":
        num_heads = step.row_norm_heads[name == "k_norm"]
        if num_heads != x.shape[1]:  # the other heads are zeros
            return _row_norm(x, w[name], num_heads, config)
        return norm(x.reshape(x.shape[0], -1), w, name, config=config, num_rows=step.num_tokens).reshape(x.shape)
    return norm(x, w, name, config=config, num_rows=step.num_tokens)


def _row_norm(x: jax.Array, scale: jax.Array, num_heads: int, config: ModelConfig) -> jax.Array:
    """The norm over all heads of x [T, heads, D], of which `num_heads` are not padding."""
    assert config.norm == "rms", "no model has a LayerNorm over all heads"
    x32 = x.astype(jnp.float32)
    mean = jnp.sum(jnp.square(x32), axis=(1, 2), keepdims=True) / (num_heads * config.head_dim)
    scale = scale.reshape(1, *x.shape[1:]).astype(jnp.float32) + config.norm_offset
    return (x32 * jax.lax.rsqrt(mean + config.norm_eps) * scale).astype(x.dtype)


def _unit_norms(
    q: jax.Array, key: jax.Array, step: Step, config: ModelConfig, index: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys divided by their root mean square in each head, in the layers with a rotary embedding."""
    rotates = _rotates(config, index)
    if rotates is False:
        return q, key
    ones = jnp.ones(config.head_dim, q.dtype)
    normed = [rms_norm(part, ones, eps=config.norm_eps, num_rows=step.num_tokens) for part in (q, key)]
    if rotates is True:
        return normed[0], normed[1]
    return jnp.where(rotates, normed[0], q), jnp.where(rotates, normed[1], key)


def _rotates(config: ModelConfig, index: Int[Array, ""] | int) -> bool | jax.Array:
    """Whether a layer has a rotary embedding."""
    rotates = [rope is not None for rope in config.layer_ropes or (config.rope,)]
    if same_for_all(rotates):
        return rotates[0]
    return rotates[index] if isinstance(index, int) else jnp.asarray(rotates)[index]


def _clipped(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Queries, keys or values within the limits of the model."""
    return x if config.clip_qkv is None else jnp.clip(x, -config.clip_qkv, config.clip_qkv)


def _rotation_of(step: Step, config: ModelConfig, index: Int[Array, ""] | int) -> Rotation | None:
    """Cosines and sines of a layer; None if it has no rotary embedding."""
    ropes = config.layer_ropes or (config.rope,)
    if same_for_all(ropes) or isinstance(index, int):
        rope = ropes[0] if same_for_all(ropes) else ropes[int(index)]
        return None if rope is None else step.rotations[rope]
    kinds = tuple(dict.fromkeys(ropes))
    some_cos, some_sin = next(iter(step.rotations.values()))
    # A layer without rotation rotates by an angle of zero.
    tables = [
        (jnp.ones_like(some_cos), jnp.zeros_like(some_sin)) if rope is None else step.rotations[rope] for rope in kinds
    ]
    kind = jnp.asarray([kinds.index(rope) for rope in ropes], jnp.int32)[index]
    cos, sin = (jnp.stack(table)[kind] for table in zip(*tables, strict=True))
    return cos, sin


def _scoring_of(config: ModelConfig, w: LayerWeights, index: jax.Array | int) -> Scoring:
    return Scoring(
        scale=1.0 / math.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale,
        sliding_window=_window_of(config, index),
        soft_cap=config.attention_soft_cap,
        alibi_slopes=jnp.asarray(config.alibi_slopes, jnp.float32) if config.alibi_slopes else None,
        sinks=w["sinks"].astype(jnp.float32) if config.attention_sinks else None,
    )


def _index_of(step: Step, index: jax.Array | int) -> RaggedIndex:
    """The index of the cache group of a layer, with the plan for its window."""
    if same_for_all(step.kinds) or isinstance(index, int):
        return step.indices[step.kinds[0] if same_for_all(step.kinds) else step.kinds[int(index)]]
    kind = jnp.asarray(step.kinds, jnp.int32)[index]
    return jax.tree.map(
        lambda *plans: plans[0] if all(x is plans[0] for x in plans) else jnp.stack(plans)[kind], *step.indices
    )


def _row_of(step: Step, index: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """The row of the cache that belongs to a layer."""
    if step.rows == tuple(range(len(step.rows))):
        return index
    return step.rows[index] if isinstance(index, int) else jnp.asarray(step.rows, jnp.int32)[index]


def _window_of(config: ModelConfig, index: jax.Array | int) -> int | jax.Array | None:
    """Size of the sliding window of a layer, in tokens; None: no window."""
    windows = () if config.window_chunks else config.layer_windows
    if not windows or same_for_all(windows):
        return windows[0] if windows else None
    if isinstance(index, int):
        return windows[index]
    return jnp.asarray([_NO_WINDOW if window is None else window for window in windows], jnp.int32)[index]
