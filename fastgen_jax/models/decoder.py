"""The decoder: one pure function from a batch of chunks to the logits that are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import Params
from fastgen_jax.models.rope import rotate, rotation
from pallas_kernels.matmul import linear, swiglu
from pallas_kernels.ragged_attention import ragged_attention


def forward(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    logits_tile: int | None = None,
    attention: str | Callable[..., Any] | None = None,
) -> tuple[jax.Array, KVCache]:
    """Logits f32[R, V] of `batch.sample_rows`, and the cache with the K and V of the batch's tokens.

    `logits_tile` computes the vocabulary head for so many rows at a time, and for used rows only: worth it where a
    row of logits is expensive and the number of sampled rows varies. None computes all R rows in one product.
    `attention` names an implementation of `ragged_attention`, or is one; None is the best for the platform.
    Rows of logits that are not used are finite and meaningless.
    """
    x = jnp.take(params["embed"], batch.token_ids, axis=0)  # [T, E]
    cos, sin = rotation(batch.positions, batch.rope_lengths, rope=config.rope, head_dim=config.head_dim)
    # Without the barrier XLA moves the cosines into every layer that uses them.
    cos, sin = jax.lax.optimization_barrier((cos, sin))
    num_blocks = kv_cache.k.shape[0] // config.num_layers

    def layer(x: jax.Array, cache: KVCache, w: dict[str, Any], index: jax.Array | int) -> tuple[jax.Array, KVCache]:
        h = rms_norm(x, w["attn_norm"], eps=config.norm_eps)
        h, cache = _attention(
            h, w, cache, batch, cos, sin, index, config=config, num_blocks=num_blocks, implementation=attention
        )
        x = _project(h, w, "o", residual=x)
        h = _mlp(rms_norm(x, w["mlp_norm"], eps=config.norm_eps), w)
        return _project(h, w, "down", residual=x), cache

    x, kv_cache = run_layers(layer, params["layers"], x, kv_cache, num_layers=config.num_layers)
    rows = rms_norm(jnp.take(x, batch.sample_rows, axis=0), params["final_norm"], eps=config.norm_eps)
    head = params["lm_head"] if "lm_head" in params else params["embed"].T
    return _logits(rows, head, batch.num_sample_rows, tile=logits_tile), kv_cache


def run_layers(
    layer: Callable[..., tuple[jax.Array, KVCache]],
    layers: Any,
    x: jax.Array,
    kv_cache: KVCache,
    *,
    num_layers: int,
) -> tuple[jax.Array, KVCache]:
    """Applies `layer(x, cache, weights, index)` once per layer, in the form that `layers` is given in.

    One dict of [L, ...] arrays is scanned: the program does not grow with depth. A tuple of L dicts is unrolled: on a
    CPU the slices that a scan takes are copies, which is to read and write the whole model once more in every step.
    """
    if isinstance(layers, dict):
        def body(carry: tuple[jax.Array, KVCache], xs: tuple[Any, jax.Array]) -> tuple[Any, None]:
            return layer(*carry, *xs), None

        carry, _ = jax.lax.scan(body, (x, kv_cache), (layers, jnp.arange(num_layers, dtype=jnp.int32)))
        return carry
    for index, weights in enumerate(layers):
        x, kv_cache = layer(x, kv_cache, weights, index)
    return x, kv_cache


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """`x` over its root mean square along the last axis, times `weight`; computed in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _attention(
    x: jax.Array,
    w: dict[str, Any],
    cache: KVCache,
    batch: RaggedBatch,
    cos: jax.Array,
    sin: jax.Array,
    index: jax.Array | int,
    *,
    config: ModelConfig,
    num_blocks: int,
    implementation: str | Callable[..., Any] | None,
) -> tuple[jax.Array, KVCache]:
    h, k, d = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = _project(x, w, "qkv").reshape(-1, h + 2 * k, d)  # [T, H + 2K, D]
    qkv = jnp.concatenate([rotate(qkv[:, : h + k], cos, sin), qkv[:, h + k :]], axis=1)
    if cache.k.shape[-1] != d:  # stored with zeros behind each head, which add nothing to a dot product
        qkv = jnp.pad(qkv, ((0, 0), (0, 0), (0, cache.k.shape[-1] - d)))
    attend = implementation
    if not callable(attend):
        attend = partial(ragged_attention, implementation=implementation)
    out, k_cache, v_cache = attend(
        qkv[:, :h],
        qkv[:, h : h + k],
        qkv[:, h + k :],
        cache.k,
        cache.v,
        kv_slots=batch.kv_slots,
        query_starts=batch.query_starts,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
        layer=index,
        num_blocks=num_blocks,
        scale=1.0 / math.sqrt(d),
    )
    return out[..., :d].reshape(-1, h * d), KVCache(k=k_cache, v=v_cache)


def _mlp(x: jax.Array, w: dict[str, Any]) -> jax.Array:
    """The gated hidden units [T, F], before the projection back to E."""
    if "gate_up_bias" not in w:
        return swiglu(x, w["gate_up"])
    gate, up = jnp.split(_project(x, w, "gate_up"), 2, axis=-1)
    return jax.nn.silu(gate) * up


def _project(x: jax.Array, w: dict[str, Any], name: str, *, residual: jax.Array | None = None) -> jax.Array:
    y = linear(x, w[name], residual=residual)
    return y + w[f"{name}_bias"] if f"{name}_bias" in w else y


def _logits(rows: jax.Array, head: Any, num_rows: jax.Array, *, tile: int | None) -> jax.Array:
    if tile is None or tile >= rows.shape[0]:
        return linear(rows, head).astype(jnp.float32)
    # The last tile is shifted back to end at R, for rows and logits alike, so a few rows may be computed twice.
    vocab_size = jax.eval_shape(linear, rows, head).shape[-1]

    def body(i: jax.Array, logits: jax.Array) -> jax.Array:
        start = i * tile
        some = jax.lax.dynamic_slice_in_dim(rows, start, tile)
        return jax.lax.dynamic_update_slice_in_dim(logits, linear(some, head).astype(jnp.float32), start, axis=0)

    num_tiles = (num_rows + tile - 1) // tile
    return jax.lax.fori_loop(0, num_tiles, body, jnp.zeros((rows.shape[0], vocab_size), jnp.float32))
