"""The decoder: one pure function from a batch of chunks to the requested logits.

What differs between families is in `ModelConfig`. The norms of a layer are in one of four places:

    "input"                 "output" (OLMo 2)       "both" (Gemma 2)            "residual" (OPT-350m)
    x += attn(norm(x))      x += norm(attn(x))      x += norm(attn(norm(x)))    x = norm(x + attn(x))
    x += mlp(norm(x))       x += norm(mlp(x))       x += norm(mlp(norm(x)))     x = norm(x + mlp(x))

and with `parallel_residual`: x += attn(norm(x)) + mlp(norm'(x)), where norm' may be the same norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache, RaggedBatch, StepImages
from fastgen_jax.models.adapters import AdaptedWeight, bound, rows_of, sampled_rows, with_adapters
from fastgen_jax.models.attention import attention
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import divided
from fastgen_jax.models.layer_loop import Layer, run_layers
from fastgen_jax.models.layers import norm, soft_cap
from fastgen_jax.models.mixer import mix
from fastgen_jax.models.mlp import beside_mlp, mlp
from fastgen_jax.models.params import plain_name
from fastgen_jax.models.sharding import in_order
from fastgen_jax.models.sparse import with_choice
from fastgen_jax.models.step import LayerCall, Step, prepare_step, take_rows
from fastgen_jax.models.streams import (
    in_streams,
    inputs_of_layers,
    join_streams,
    low_rank,
    scaled,
    split_streams,
    with_inputs,
)
from fastgen_jax.models.weight_spec import LayerWeights, Params
from pallas_kernels.matmul import linear
from pallas_kernels.ragged_attention import Attention

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a forward pass runs. Apart from rounding, the results do not depend on it."""

    attention: str | Attention | None = None
    """Name of an implementation of `ragged_attention`, or a replacement for it; None: the best one for the platform."""
    activation_dtype: DTypeLike | None = None
    """Dtype of the residual stream; None: that of the embedding."""
    mesh: Mesh | None = None
    """Devices that weights and cache are sharded over, by `models.sharding`; None: a single device."""
    independent_pieces: bool = False
    """Divides the attention of each sequence by its own length alone; see `ragged_attention.plan_layers`."""
    sums_in_order: bool = False
    """Adds up what devices computed in the same order for every element; see `models.sharding`."""
    wrap_layer: Callable[[Layer], Layer] | None = None
    """Makes another function of that of a layer, for example one that is computed again for a derivative."""


def forward(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    execution: Execution = Execution(),
    images: StepImages | None = None,
) -> tuple[Float[Array, "R V"], KVCache]:
    """Logits in float32 of `batch.sample_rows`, and the cache with the K and V of the batch's tokens added.

    Unused rows of logits are finite and meaningless. Differentiable with respect to plain `params`; see
    `docs/research.md`.
    """
    rows, kv_cache = hidden_rows(params, kv_cache, batch, config=config, execution=execution, images=images)
    return head(rows, params, batch.num_sample_rows, config=config)[:, : config.vocab_size], kv_cache


def hidden_rows(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    execution: Execution = Execution(),
    adapters: Mapping[str, AdaptedWeight] | None = None,
    images: StepImages | None = None,
) -> tuple[Float[Array, "R E"], KVCache]:
    """The input of `head`: the residual stream of `batch.sample_rows` after the final norm, and the cache.

    With a mesh, weights and cache are those of the divided model (see `division`). `adapters` are those that
    `batch.adapters` numbers.
    """
    step = prepare_step(
        batch,
        kv_cache,
        config=config,
        implementation=execution.attention,
        mesh=execution.mesh,
        spans=None if images is None else images.spans,
        independent_pieces=execution.independent_pieces,
        sums_in_order=execution.sums_in_order,
    )
    if execution.mesh is not None:
        config = divided(config, execution.mesh.size)
    run = _parallel_layer if config.parallel_residual else _sequential_layer
    layer = partial(run, step=step, config=config)
    if config.full_heads is not None or config.reader_mlp_dim is not None:
        layer = _with_own_sizes(run, step, config)
    if adapters is not None:
        params = with_adapters(params, adapters, config)
        layer = _for_adapters(layer, batch, adapters)
    x = _embed(params, batch, config, execution.activation_dtype)
    if images is not None:
        x = jnp.where(images.is_image[:, None], images.embeddings[0].astype(x.dtype), x)
        layer = _adding(layer, images.embeddings[1:].astype(x.dtype))
    if config.layer_inputs is not None:
        inputs = inputs_of_layers(params, batch.token_ids, x, config=config, num_tokens=step.num_tokens)
        layer = (with_inputs if config.altup is None else in_streams)(layer, inputs, step=step, config=config)
    if config.layer_scale:
        layer = scaled(layer)
    if step.sums_in_order:
        layer = _in_order(layer, step, config)
    if execution.wrap_layer is not None:
        layer = execution.wrap_layer(layer)
    if config.altup is not None:
        x = split_streams(x, params, config.altup, step.num_tokens)
    if step.sparse is not None:
        kv_cache = with_choice(kv_cache, config, batch.token_ids.shape[0])
    rows, kv_cache = run_layers(
        layer, params["layers"], x, kv_cache, rows=batch.sample_rows, config=config, mesh=execution.mesh
    )
    if step.sparse is not None:
        kv_cache = replace(kv_cache, chosen=None)
    if config.altup is not None:
        rows = join_streams(rows, params, config.altup, batch.num_sample_rows)
    if config.final_norm:
        rows = norm(rows, params, "final_norm", config=config, num_rows=batch.num_sample_rows)
    if config.embed_proj_dim is not None:
        rows = linear(rows, params["project_out"])
    return rows, kv_cache


def _with_own_sizes(run: Callable[..., tuple[jax.Array, KVCache]], step: Step, config: ModelConfig) -> Layer:
    """`run` for each layer with its own sizes; weights have the names that they have in other models."""

    def sized(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        own = {plain_name(name): leaf for name, leaf in w.items()}
        return run(x, cache, own, call, step=step, config=config.of_layer(call.first))

    return sized


def _for_adapters(layer: Layer, batch: RaggedBatch, adapters: Mapping[str, AdaptedWeight]) -> Layer:
    """`layer` with the adapters of the batch's rows."""
    ids = batch.adapters
    assert ids is not None, "a batch for adapters numbers them"
    count = next(iter(adapters.values())).count
    tokens = rows_of(ids, count)
    sampled = sampled_rows(ids, batch.sample_rows, batch.num_sample_rows, count)

    def adapted(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        return layer(x, cache, bound(w, tokens, tokens if call.rows is None else sampled), call)

    return adapted


def _in_order(layer: Layer, step: Step, config: ModelConfig) -> Layer:
    """`layer` with weights whose products are added up over devices in order."""
    mesh = step.mesh
    assert mesh is not None

    def ordered(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        return layer(x, cache, in_order(w, mesh, config), call)

    return ordered


def _adding(layer: Layer, parts: Float[Array, "parts T E"]) -> Layer:
    """`layer` with `parts[i]` added to the result of layer i."""
    count = len(parts)
    if not count:
        return layer

    def adding(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        x, cache = layer(x, cache, w, call)
        if isinstance(call.index, int):
            return (x + take_rows(parts[call.index], call.rows) if call.index < count else x), cache
        part = jax.lax.dynamic_index_in_dim(parts, jnp.minimum(call.index, count - 1), keepdims=False)
        return jnp.where(call.index < count, x + take_rows(part, call.rows), x), cache

    return adding


def _embed(params: Params, batch: RaggedBatch, config: ModelConfig, dtype: DTypeLike | None) -> jax.Array:
    x = jnp.take(params["embed"], batch.token_ids, axis=0)[:, : config.embed_proj_dim or config.embed_dim]
    if dtype is not None:
        x = x.astype(dtype)
    if config.embed_multiplier != 1.0:
        x = x * config.embed_multiplier
    if config.embed_proj_dim is not None:
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
    w: LayerWeights,
    call: LayerCall,
    *,
    step: Step,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    place, scale = config.norm_placement, config.residual_multiplier
    before, after = place in ("input", "both"), place in ("output", "both")
    # Adding x within the last product is cheaper, if nothing comes between them.
    fused = not after and scale == 1.0

    h = norm(x, w, "attn_norm", config=config, num_rows=step.num_tokens) if before and call.mixes else x
    x, used = take_rows(x, call.rows), step.num_rows(call.rows)
    if call.mixes:
        y, cache = mix(h, w, cache, step, call, config=config, residual=x if fused else None)
        if not fused:
            y = x + scale * (norm(y, w, "post_attn_norm", config=config, num_rows=used) if after else y)
        if config.laurel_rank:
            y = (y + low_rank(take_rows(h, call.rows), w, config=config, num_rows=used)) * 0.5**0.5
        x = norm(y, w, "attn_norm", config=config, num_rows=used) if place == "residual" else y
    if not call.has_mlp:
        return x, cache

    h = norm(x, w, "mlp_norm", config=config, num_rows=used) if before else x
    residual = x if fused else None
    places = {"mesh": step.mesh, "in_order": step.sums_in_order}
    y = mlp(h, w, call, config=config, num_tokens=used, residual=residual, **places)
    if call.first_expert is not None and config.moe is not None and config.moe.beside_mlp:
        y = beside_mlp(y, x, w, call, config=config, num_tokens=used, **places)
    if not fused:
        y = x + scale * (norm(y, w, "post_mlp_norm", config=config, num_rows=used) if after else y)
    return norm(y, w, "mlp_norm", config=config, num_rows=used) if place == "residual" else y, cache


def _parallel_layer(
    x: jax.Array,
    cache: KVCache,
    w: LayerWeights,
    call: LayerCall,
    *,
    step: Step,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    h = norm(x, w, "attn_norm", config=config, num_rows=step.num_tokens)
    x, used = take_rows(x, call.rows), step.num_rows(call.rows)
    for_mlp = take_rows(h, call.rows) if config.shared_norm else norm(x, w, "mlp_norm", config=config, num_rows=used)
    y, cache = attention(h, w, cache, step, call, config=config, residual=x)
    places = {"mesh": step.mesh, "in_order": step.sums_in_order}
    y = mlp(for_mlp, w, call, config=config, num_tokens=used, residual=y, **places)
    return y, cache


def head(rows: Float[Array, "R E"], params: Params, num_rows: Int[Array, ""], *, config: ModelConfig) -> Float[Array, "R V"]:
    """Logits in float32 of `rows`, of which the first `num_rows` are used.

    Columns from V on, which the head of a divided model may have, are padding.
    """
    weight = params["lm_head"] if "lm_head" in params else params["embed"].T
    if (missing := weight.shape[0] - rows.shape[1]) > 0:  # see `ModelConfig.embed_columns`
        rows = jnp.pad(rows, ((0, 0), (0, missing)))
    logits = linear(rows, weight, num_rows=num_rows).astype(jnp.float32)
    if config.head_bias:
        logits = logits + params["lm_head_bias"].astype(jnp.float32)[None, :]
    if config.logits_multiplier != 1.0:
        logits = logits * config.logits_multiplier
    return soft_cap(logits, config.logits_soft_cap)
