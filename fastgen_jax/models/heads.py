"""Queries, keys and values of a layer: normalized, clipped and rotated as the model says."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastgen_jax.models.columns import split_columns
from fastgen_jax.models.config import ModelConfig, same_for_all
from fastgen_jax.models.layers import norm
from fastgen_jax.models.mla import latent_heads
from fastgen_jax.models.rope import Rotation
from fastgen_jax.models.sharding import divide_columns, sum_in_order
from fastgen_jax.models.sparse import index_keys, index_queries
from fastgen_jax.models.step import Step
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.norm import rms_norm
from pallas_kernels.rotary import rotary, rotate
from pallas_kernels.sparse_attention import IndexQueries

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def latent_heads_of(
    x: Float[Array, "T E"], w: LayerWeights, step: Step, turn: Rotation | None, *, config: ModelConfig
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"], IndexQueries | None]:
    """`heads_of` of latent attention, for its input, and what the indexer of this layer asks if it has one to ask."""
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


def heads_of(
    x: Float[Array, "T _"], w: LayerWeights, step: Step, turn: Rotation | None, *, config: ModelConfig
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
    """Queries, keys and values, normalized and rotated as the config says; `x` is the projection to all of them."""
    h, k, d = config.num_heads, config.num_kv_heads, config.head_dim
    norm_first = config.qk_norm not in (None, "unit") and not config.qk_norm_rotated
    num_devices = 1 if step.mesh is None else step.mesh.size
    if turn is not None and not norm_first and not config.v_norm:
        rotated = partial(_rotated_heads, config=config, num_heads=h // num_devices)
        rotated = rotated if step.mesh is None else divide_columns(rotated, step.mesh)
        q, key, value = rotated(x, *turn)
        return (*_qk_norms(q, key, w, step, config), value) if config.qk_norm_rotated else (q, key, value)
    # On several devices, one pass over all heads would gather them on every device. If attention rotates them, it does so in
    # their columns of x.
    if num_devices > 1 or (turn is None and step.attend_rotates):
        widths = (h * d, *(k * d,) * (1 if config.keys_are_values else 2))
        q, key, *values = (part.reshape(x.shape[0], -1, d) for part in split_columns(x, widths, num_devices))
        value = values[0] if values else key
        if norm_first:
            q, key = _qk_norms(q, key, w, step, config)
        q, key, value = (_clipped(part, config) for part in (q, key, _v_norm(value, step, config)))
        if turn is not None:
            q, key = rotate(q, *turn), rotate(key, *turn)
        return (*_qk_norms(q, key, w, step, config), value) if config.qk_norm_rotated else (q, key, value)
    if config.keys_are_values:
        x = jnp.concatenate([x, x[:, h * d :]], axis=1)
    qkv = x.reshape(-1, h + 2 * k, d)
    if norm_first:
        q, key = _qk_norms(qkv[:, :h], qkv[:, h : h + k], w, step, config)
        qkv = jnp.concatenate([q, key, _v_norm(qkv[:, h + k :], step, config)], axis=1)
    qkv = _clipped(qkv, config)
    q, key, value = (qkv[:, :h], qkv[:, h : h + k], qkv[:, h + k :]) if turn is None else rotary(qkv, *turn, num_heads=h)
    return (*_qk_norms(q, key, w, step, config), value) if config.qk_norm_rotated else (q, key, value)


def _rotated_heads(
    x: Float[Array, "T _"], cos: Float[Array, "T P"], sin: Float[Array, "T P"], *, config: ModelConfig, num_heads: int
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
    """Clipped queries, keys and values, of which queries and keys are rotated in one pass; those of one device."""
    if config.keys_are_values:
        x = jnp.concatenate([x, x[:, num_heads * config.head_dim :]], axis=1)
    return rotary(_clipped(x.reshape(x.shape[0], -1, config.head_dim), config), cos, sin, num_heads=num_heads)


def queries_of(
    x: Float[Array, "T HD"], w: LayerWeights, step: Step, turn: Rotation | None, *, config: ModelConfig
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
    """As `heads_of`, of a layer that reads the keys and values of another one: zeros take their place, and are dropped."""
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
        if num_heads != x.shape[1] or step.sums_in_order:  # the other heads are zeros
            return _row_norm(x, w[name], num_heads, config, step.mesh if step.sums_in_order else None)
        return norm(x.reshape(x.shape[0], -1), w, name, config=config, num_rows=step.num_tokens).reshape(x.shape)
    return norm(x, w, name, config=config, num_rows=step.num_tokens)


def _row_norm(x: jax.Array, scale: jax.Array, num_heads: int, config: ModelConfig, mesh: Mesh | None = None) -> jax.Array:
    """The norm over all heads of x [T, heads, D], of which `num_heads` are not padding; with `mesh` the sum is in order."""
    assert config.norm == "rms", "no model has a LayerNorm over all heads"
    x32 = x.astype(jnp.float32)
    squares = jnp.square(x32)
    total = jnp.sum(squares, axis=(1, 2), keepdims=True) if mesh is None else sum_in_order(squares, mesh)
    mean = total / (num_heads * config.head_dim)
    scale = scale.reshape(1, *x.shape[1:]).astype(jnp.float32) + config.norm_offset
    return (x32 * jax.lax.rsqrt(mean + config.norm_eps) * scale).astype(x.dtype)


def unit_norms(
    q: jax.Array, key: jax.Array, step: Step, config: ModelConfig, index: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys divided by their root mean square in each head, in the layers with a rotary embedding."""
    rotates = layer_rotates(config, index)
    if rotates is False:
        return q, key
    ones = jnp.ones(config.head_dim, q.dtype)
    normed = [rms_norm(part, ones, eps=config.norm_eps, num_rows=step.num_tokens) for part in (q, key)]
    if rotates is True:
        return normed[0], normed[1]
    return jnp.where(rotates, normed[0], q), jnp.where(rotates, normed[1], key)


def layer_rotates(config: ModelConfig, index: Int[Array, ""] | int) -> bool | jax.Array:
    """Whether a layer has a rotary embedding."""
    rotates = [rope is not None for rope in config.layer_ropes or (config.rope,)]
    if same_for_all(rotates):
        return rotates[0]
    return rotates[index] if isinstance(index, int) else jnp.asarray(rotates)[index]


def _clipped(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Queries, keys or values within the limits of the model."""
    return x if config.clip_qkv is None else jnp.clip(x, -config.clip_qkv, config.clip_qkv)


def rotation_of(step: Step, config: ModelConfig, index: Int[Array, ""] | int) -> Rotation | None:
    """Cosines and sines of a layer; None if it has no rotary embedding."""
    ropes = config.layer_ropes or (config.rope,)
    if same_for_all(ropes) or isinstance(index, int):
        rope = ropes[0] if same_for_all(ropes) else ropes[int(index)]
        return None if rope is None else step.rotations[rope]
    assert step.stacked_rotations is not None, "layers differ"
    cos, sin = (table[rotation_row(config, index)] for table in step.stacked_rotations)
    return cos, sin


def rotation_row(config: ModelConfig, index: Int[Array, ""] | int) -> Int[Array, ""]:
    """Where the rotation of a layer is in `Step.stacked_rotations`."""
    kinds = config.rope_kinds
    return jnp.asarray([kinds.index(rope) for rope in config.layer_ropes], jnp.int32)[index]
