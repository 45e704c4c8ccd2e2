"""The attention block of a layer, between its norm and the residual stream."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.core import KVCache
from fastgen_jax.models.cache_rows import own_part, side_by_side
from fastgen_jax.models.columns import split_columns
from fastgen_jax.models.config import ModelConfig, same_for_all
from fastgen_jax.models.heads import (
    heads_of,
    latent_heads_of,
    layer_rotates,
    queries_of,
    rotation_of,
    rotation_row,
    unit_norms,
)
from fastgen_jax.models.kept_keys import keep, kept
from fastgen_jax.models.layer_kinds import NO_WINDOW
from fastgen_jax.models.layers import project
from fastgen_jax.models.mla import expand_values, latents_of
from fastgen_jax.models.sparse import attend_to_chosen
from fastgen_jax.models.step import LayerCall, Step, take_rows
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.ragged_attention import CacheLayer, RaggedIndex, Scoring

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


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
    turn, asked = rotation_of(step, config, index), None
    rotates_later = step.attend_rotates and call.has_keys and _is_rotated_last(config, step, call, cache)
    if config.mla is None:
        now = None if rotates_later else turn
        q, key, value = (heads_of if call.has_keys else queries_of)(x, w, step, now, config=config)
    else:
        q, key, value, asked = latent_heads_of(x, w, step, turn, config=config)
    if config.qk_norm == "unit":
        q, key = unit_norms(q, key, step, config, index)
    if step.query_scale is not None:
        scale = step.query_scale
        if config.query_growth is not None and config.query_growth.unrotated_only:
            scale = jnp.where(layer_rotates(config, index), 1.0, scale)
        q = (q.astype(jnp.float32) * scale[:, None, None]).astype(q.dtype)
    if config.attention_scale_by_layer:
        q = (q.astype(jnp.float32) / (jnp.asarray(index, jnp.float32) + 1.0)).astype(q.dtype)
    together, num_kv_heads = step.side_by_side[call.first], key.shape[1]
    if together > 1:
        q, key, value = side_by_side(q, key, value, together)
    if (missing := cache.head_dim - q.shape[-1]) > 0:  # zeros in the cache, which do not change a dot product
        q, key, value = (jnp.pad(part, ((0, 0), (0, 0), (0, missing))) for part in (q, key, value))
    if step.kept is not None and call.has_keys:
        cache = keep(cache, key, value, _of_layer(step.kept, index))
    elif step.kept is not None:
        key, value = kept(cache, key, _of_layer(step.kept, index))
    layer = CacheLayer(number=_row_of(step, index), num_blocks=step.num_blocks)
    scoring = _scoring_of(config, w, cache, index)
    if rotates_later and (step.stacked_rotations is None or isinstance(index, int)):
        scoring = replace(scoring, rotation=turn)
    elif rotates_later:
        scoring = replace(scoring, rotation=step.stacked_rotations, rotation_row=rotation_row(config, index))
    out, k_cache, v_cache = step.attend(q, key, value, cache.k, cache.v, _index_of(step, call), layer, scoring)
    cache = replace(cache, k=k_cache, v=v_cache)
    if step.sparse is not None:
        assert config.mla is not None, "only latent attention has an indexer"
        places = {"rank": config.mla.kv_rank, "scale": scoring.scale, "mesh": step.mesh}
        out, cache = attend_to_chosen(q, out, asked, cache, step.batch.index, layer, step.sparse, **places)
    out = take_rows(out[..., : together * d], rows)
    if together > 1:
        out = own_part(out, num_kv_heads, together)
    if config.mla is not None:
        out = expand_values(out, w, config=config.mla, num_tokens=step.num_rows(rows))
    out = out.reshape(out.shape[0], -1)
    if config.attention_multiplier != 1.0:
        out = out * config.attention_multiplier
    if gate is not None:
        out = out * jax.nn.sigmoid(take_rows(gate, rows))
    return project(out, w, "o", residual=residual, num_rows=step.num_rows(rows)), cache


def _is_rotated_last(config: ModelConfig, step: Step, call: LayerCall, cache: KVCache) -> bool:
    """Whether nothing is done to queries and keys between their rotation and the cache."""
    return (
        config.mla is None
        and config.qk_norm != "unit"
        and not config.qk_norm_rotated
        and step.query_scale is None
        and not config.attention_scale_by_layer
        and cache.head_dim == config.head_dim
        and step.sharing[call.first] == 1
        and (step.mesh is not None or cache.k.shape[1] == config.num_kv_heads)
    )


def _scoring_of(config: ModelConfig, w: LayerWeights, cache: KVCache, index: jax.Array | int) -> Scoring:
    return Scoring(
        scale=1.0 / math.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale,
        sliding_window=_window_of(config, index),
        soft_cap=config.attention_soft_cap,
        alibi_slopes=jnp.asarray(config.alibi_slopes, jnp.float32) if config.alibi_slopes else None,
        sinks=w["sinks"].astype(jnp.float32) if config.attention_sinks else None,
        latents=None if cache.packed else latents_of(config.mla),
    )


def _index_of(step: Step, call: LayerCall) -> RaggedIndex:
    """The index of the cache group of a layer, with the plan for its window."""
    index = call.index
    if same_for_all(step.kinds) or isinstance(index, int):
        return step.indices[step.kinds[0] if same_for_all(step.kinds) else step.kinds[int(index)]]
    # Plans are of one shape for all layers with as many heads.
    alike = [kind for kind, sharing in zip(step.kinds, step.sharing, strict=True) if sharing == step.sharing[call.first]]
    used = sorted(set(alike))
    kind = jnp.asarray([used.index(kind) if kind in used else 0 for kind in step.kinds], jnp.int32)[index]
    return jax.tree.map(
        lambda *plans: plans[0] if all(x is plans[0] for x in plans) else jnp.stack(plans)[kind],
        *(step.indices[kind] for kind in used),
    )


def _row_of(step: Step, index: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """The row of the cache that belongs to a layer."""
    return index if step.rows == tuple(range(len(step.rows))) else _of_layer(step.rows, index)


def _of_layer(numbers: tuple[int, ...], index: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """The number of a layer, out of those of all."""
    return numbers[index] if isinstance(index, int) else jnp.asarray(numbers, jnp.int32)[index]


def _window_of(config: ModelConfig, index: jax.Array | int) -> int | jax.Array | None:
    """Size of the sliding window of a layer, in tokens; None: no window."""
    windows = () if config.window_chunks else config.layer_windows
    if not windows or same_for_all(windows):
        return windows[0] if windows else None
    if isinstance(index, int):
        return windows[index]
    return jnp.asarray([NO_WINDOW if window is None else window for window in windows], jnp.int32)[index]
