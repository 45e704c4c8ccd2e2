"""The decoder: one pure function from a batch of chunks to the logits that are wanted.

What differs between families is in `ModelConfig`. The norms of a layer stand in one of four places:

    "input"                 "output" (OLMo 2)       "both" (Gemma 2)            "residual" (OPT-350m)
    x += attn(norm(x))      x += norm(attn(x))      x += norm(attn(norm(x)))    x = norm(x + attn(x))
    x += mlp(norm(x))       x += norm(mlp(x))       x += norm(mlp(norm(x)))     x = norm(x + mlp(x))

and with `parallel_residual`: x += attn(norm(x)) + mlp(norm'(x)), where norm' may be the same norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models.attention import Step, attention, prepare_step, take_rows
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import norm, soft_cap
from fastgen_jax.models.mlp import mlp
from fastgen_jax.models.params import EXPERT_MATRICES, Params, layers_with
from pallas_kernels.matmul import linear
from pallas_kernels.ragged_attention import Attention

Layer = Callable[..., tuple[jax.Array, KVCache]]


def forward(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    attention: str | Attention | None = None,
    activation_dtype: Any = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVCache]:
    """Logits f32[R, V] of `batch.sample_rows`, and the cache with the K and V of the batch's tokens.

    Differentiable with respect to plain `params`; see `docs/research.md`.
    `attention` names an implementation of `ragged_attention`, or is one; None is the best for the platform.
    `activation_dtype` is that of the residual stream; None is the embedding's.
    `mesh` is what weights and cache are divided over, by `models.sharding`. Rows of logits that are not used are finite
    and meaningless.
    """
    rows, kv_cache = hidden_rows(
        params, kv_cache, batch, config=config, attention=attention, activation_dtype=activation_dtype, mesh=mesh
    )
    return head(rows, params, batch.num_sample_rows, config=config), kv_cache


def hidden_rows(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    attention: str | Attention | None = None,
    activation_dtype: Any = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVCache]:
    """What `head` makes the logits of `forward` from: the residual stream [R, E] of `batch.sample_rows`, normalised."""
    step = prepare_step(batch, kv_cache, config=config, implementation=attention, mesh=mesh)

    def layer(
        x: jax.Array, cache: KVCache, w: dict[str, Any], index: jax.Array | int, rows: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        run = _parallel_layer if config.parallel_residual else _sequential_layer
        return run(x, cache, w, index, step, rows, config=config)

    x = _embed(params, batch, config, activation_dtype)
    rows, kv_cache = run_layers(layer, params["layers"], x, kv_cache, rows=batch.sample_rows, config=config)
    if config.final_norm:
        rows = norm(rows, params, "final_norm", config=config, num_rows=batch.num_sample_rows)
    if "project_out" in params:
        rows = linear(rows, params["project_out"])
    return rows, kv_cache


def run_layers(
    layer: Layer, layers: Any, x: jax.Array, kv_cache: KVCache, *, rows: jax.Array, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    """x[rows] [R, E] after `layer(x, cache, weights, index)` once per layer, in the form that `layers` is given in.

    One dict of stacked arrays is scanned: the program does not grow with depth. Where layers have different weights
    (an MLP here, experts there), each run of like layers is one scan. A tuple of L dicts is unrolled: on a CPU the
    slices that a scan takes are copies, which is to read and write the whole model once more in every step. The last
    of them is told which rows are wanted: behind its attention the others are of no use to anybody.
    """
    if not isinstance(layers, dict):
        for index, weights in enumerate(layers[:-1]):
            x, kv_cache = layer(x, kv_cache, weights, index)
        return layer(x, kv_cache, layers[-1], len(layers) - 1, rows)

    having = layers_with(config)
    # Experts are handed over as one stack: a slice of them would be a copy, since a grouped matmul is opaque to XLA.
    experts = {
        name: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), layers[name])
        for name in EXPERT_MATRICES
        if name in layers
    }
    if not experts and all(len(rows) == config.num_layers for rows in having.values()):

        def body(carry: tuple[jax.Array, KVCache], xs: tuple[Any, jax.Array]) -> tuple[Any, None]:
            return layer(*carry, *xs), None

        carry, _ = jax.lax.scan(body, (x, kv_cache), (layers, jnp.arange(config.num_layers, dtype=jnp.int32)))
        return jnp.take(carry[0], rows, axis=0), carry[1]

    carry = (x, kv_cache)
    for start, stop in _runs(having, config.num_layers):
        first_row = {name: rows.index(start) for name, rows in having.items() if start in rows}

        def some(carry: tuple[jax.Array, KVCache], i: jax.Array, start=start, first_row=first_row) -> tuple[Any, None]:
            # What a scan does with its xs, for stacks that hold the layers of other runs as well.
            weights = {
                name: jax.tree.map(
                    lambda leaf, row=row: jax.lax.dynamic_index_in_dim(leaf, row + i, keepdims=False), layers[name]
                )
                for name, row in first_row.items()
                if name not in experts
            }
            if config.moe is not None and first_row.keys() & experts.keys():
                weights |= experts
                weights["first_expert"] = (first_row[EXPERT_MATRICES[0]] + i) * config.moe.num_experts
            return layer(*carry, weights, start + i), None

        carry, _ = jax.lax.scan(some, carry, jnp.arange(stop - start, dtype=jnp.int32))
    return jnp.take(carry[0], rows, axis=0), carry[1]


def _runs(having: dict[str, tuple[int, ...]], num_layers: int) -> list[tuple[int, int]]:
    """[start, stop) of the longest runs of neighbouring layers with the same weights."""
    kinds = [frozenset(name for name, rows in having.items() if i in rows) for i in range(num_layers)]
    starts = [i for i in range(num_layers) if i == 0 or kinds[i] != kinds[i - 1]]
    return list(zip(starts, [*starts[1:], num_layers], strict=True))


def _embed(params: Params, batch: RaggedBatch, config: ModelConfig, dtype: Any) -> jax.Array:
    x = jnp.take(params["embed"], batch.token_ids, axis=0)  # [T, E]
    if dtype is not None:
        x = x.astype(dtype)
    if config.embed_multiplier != 1.0:
        x = x * config.embed_multiplier
    if "project_in" in params:
        x = linear(x, params["project_in"])
    if config.learned_positions:
        places = jnp.take(params["position_embed"], batch.positions + config.position_offset, axis=0, mode="clip")
        x = x + places.astype(x.dtype)
    if config.embed_norm:
        x = norm(x, params, "embed_norm", config=config, num_rows=batch.index.query_starts[-1])
    return x


def _sequential_layer(
    x: jax.Array,
    cache: KVCache,
    w: dict[str, Any],
    index: jax.Array | int,
    step: Step,
    rows: jax.Array | None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    place, scale = config.norm_placement, config.residual_multiplier
    before, after = place in ("input", "both"), place in ("output", "both")
    # Adding x inside the last product is cheaper, where nothing stands between them.
    fused = not after and scale == 1.0

    h = norm(x, w, "attn_norm", config=config, num_rows=step.num_tokens) if before else x
    x, used = take_rows(x, rows), step.num_rows(rows)
    y, cache = attention(h, w, cache, step, index, rows, config=config, residual=x if fused else None)
    if not fused:
        y = x + scale * (norm(y, w, "post_attn_norm", config=config, num_rows=used) if after else y)
    x = norm(y, w, "attn_norm", config=config, num_rows=used) if place == "residual" else y

    h = norm(x, w, "mlp_norm", config=config, num_rows=used) if before else x
    y = mlp(h, w, config=config, num_tokens=used, residual=x if fused else None, mesh=step.mesh)
    if not fused:
        y = x + scale * (norm(y, w, "post_mlp_norm", config=config, num_rows=used) if after else y)
    return norm(y, w, "mlp_norm", config=config, num_rows=used) if place == "residual" else y, cache


def _parallel_layer(
    x: jax.Array,
    cache: KVCache,
    w: dict[str, Any],
    index: jax.Array | int,
    step: Step,
    rows: jax.Array | None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    h = norm(x, w, "attn_norm", config=config, num_rows=step.num_tokens)
    x, used = take_rows(x, rows), step.num_rows(rows)
    for_mlp = take_rows(h, rows) if config.shared_norm else norm(x, w, "mlp_norm", config=config, num_rows=used)
    y, cache = attention(h, w, cache, step, index, rows, config=config, residual=x)
    y = mlp(for_mlp, w, config=config, num_tokens=used, residual=y, mesh=step.mesh)
    return y, cache


def head(rows: jax.Array, params: Params, num_rows: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits f32[R, V] of `rows` [R, E], of which the first `num_rows` are used."""
    weight = params["lm_head"] if "lm_head" in params else params["embed"].T
    logits = linear(rows, weight, num_rows=num_rows).astype(jnp.float32)
    if config.head_bias:
        logits = logits + params["lm_head_bias"].astype(jnp.float32)
    if config.logits_multiplier != 1.0:
        logits = logits * config.logits_multiplier
    return soft_cap(logits, config.logits_soft_cap)
