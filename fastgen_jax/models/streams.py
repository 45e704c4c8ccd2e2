"""Several residual streams (AltUp, arXiv:2301.13310), a low-rank residual (LAuReL, arXiv:2411.07501), and inputs of layers.

A layer of Gemma 3n, around what the decoder computes of one stream:

    streams      x0 x1 x2 x3                predicted from each other
    active       x0 -> layer -> y           attention and MLP
    corrected    x0 x1 x2 x3                each by its share of y - x0
    inputs       x1 x2 x3 += f(x0, embedding of the token for this layer)

With a single stream, the inputs are added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.core import KVCache
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import ACTIVATIONS, norm, project
from fastgen_jax.models.step import LayerCall, Step, take_rows
from fastgen_jax.models.stream_config import AltUp
from fastgen_jax.models.weight_spec import LayerWeights, Params
from pallas_kernels.matmul import linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Layer = Callable[[jax.Array, KVCache, LayerWeights, LayerCall], tuple[jax.Array, KVCache]]

_LEAST_POWER = 1e-5  # of a stream, where it is divided by its root mean square


def inputs_of_layers(
    params: Params, token_ids: Int[Array, " T"], x: Float[Array, "T E"], *, config: ModelConfig, num_tokens: Int[Array, ""]
) -> Float[Array, "L T input"]:
    """What each layer adds of the tokens `token_ids`, whose embeddings are `x`."""
    inputs = config.layer_inputs
    assert inputs is not None, "the model has inputs of layers"
    known = jnp.where(token_ids < inputs.vocab_size, token_ids, 0)
    own = jnp.take(params["layer_embed"], known, axis=0).astype(x.dtype) * inputs.dim**0.5
    context = linear(x, params["layer_inputs_proj"], num_rows=num_tokens) * config.embed_dim**-0.5
    shape = (x.shape[0], config.num_layers, inputs.dim)
    context = norm(context.reshape(shape), params, "layer_inputs_norm", config=config, num_rows=num_tokens)
    return ((context + own.reshape(shape)) * 0.5**0.5).swapaxes(0, 1)


def split_streams(x: Float[Array, "T E"], params: Params, altup: AltUp, num_tokens: Int[Array, ""]) -> Float[Array, "T n E"]:
    """The streams that begin with the embeddings `x`: these, and projections of them with the same root mean square."""
    others = linear(x, params["streams_in"], num_rows=num_tokens).reshape(x.shape[0], altup.num_streams - 1, x.shape[1])
    return jnp.concatenate([x[:, None], _with_power_of(x[:, None], others)], axis=1)


def join_streams(x: Float[Array, "R n E"], params: Params, altup: AltUp, num_rows: Int[Array, ""]) -> Float[Array, "R E"]:
    """The mean of the streams, of which all but the first are projected before."""
    first = x[:, :1]
    others = [linear(x[:, i], params[f"stream_out_{i}"], num_rows=num_rows) for i in range(1, altup.num_streams)]
    streams = jnp.concatenate([first, _with_power_of(first, jnp.stack(others, axis=1))], axis=1)
    return jnp.mean(streams.astype(jnp.float32), axis=1).astype(x.dtype)


def _with_power_of(like: Float[Array, "T one E"], x: Float[Array, "T n E"]) -> Float[Array, "T n E"]:
    """`x` scaled to the root mean square of `like`."""
    wanted, own = (jnp.mean(jnp.square(part.astype(jnp.float32)), axis=-1, keepdims=True) for part in (like, x))
    return (x.astype(jnp.float32) * jnp.sqrt(wanted / jnp.maximum(own, _LEAST_POWER))).astype(x.dtype)


def in_streams(layer: Layer, inputs: Float[Array, "L T input"], *, step: Step, config: ModelConfig) -> Layer:
    """A layer on streams [T, n, E], of `layer`, which computes the active one [T, E]."""
    altup = config.altup
    assert altup is not None, "the model has several streams"

    def computed(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        predicted = _predicted(x, w, altup, config, step.num_tokens)
        y, cache = layer(predicted[:, altup.active].astype(x.dtype), cache, w, call)
        predicted, used = take_rows(predicted, call.rows), step.num_rows(call.rows)
        weights = _modalities(y, w, config, used) @ w["stream_correct"].astype(jnp.float32) + 1.0
        change = y.astype(jnp.float32) - predicted[:, altup.active]
        corrected = predicted + change[:, None] * weights[:, :, None]
        active = corrected[:, altup.active]
        if altup.scaled:
            active = active * w["stream_scale"].astype(jnp.float32)[None]
        added = _from_inputs(active.astype(x.dtype), w, inputs, call, step, config)
        others = corrected[:, 1:] + added[:, None].astype(jnp.float32)
        return jnp.concatenate([corrected[:, :1], others], axis=1).astype(x.dtype), cache

    return computed


def with_inputs(layer: Layer, inputs: Float[Array, "L T input"], *, step: Step, config: ModelConfig) -> Layer:
    """`layer`, to whose result the inputs of the layer are added."""

    def added(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        x, cache = layer(x, cache, w, call)
        return x + _from_inputs(x, w, inputs, call, step, config), cache

    return added


def scaled(layer: Layer) -> Layer:
    """`layer`, whose result is multiplied by its learned scale."""

    def multiplied(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        x, cache = layer(x, cache, w, call)
        return x * w["layer_scale"].astype(x.dtype)[None], cache

    return multiplied


def low_rank(x: Float[Array, "T E"], w: LayerWeights, *, config: ModelConfig, num_rows: Int[Array, ""]) -> jax.Array:
    """x + norm(x @ in @ out), in the dtype of `x`."""
    y = project(project(x, w, "laurel_in", num_rows=num_rows), w, "laurel_out", num_rows=num_rows)
    return x + norm(y, w, "laurel_norm", config=config, num_rows=num_rows)


def _from_inputs(
    x: Float[Array, "T E"], w: LayerWeights, inputs: jax.Array, call: LayerCall, step: Step, config: ModelConfig
) -> Float[Array, "T E"]:
    of_layer = (
        inputs[call.index]
        if isinstance(call.index, int)
        else jax.lax.dynamic_index_in_dim(inputs, call.index, keepdims=False)
    )
    used = step.num_rows(call.rows)
    hidden = ACTIVATIONS[config.activation](project(x, w, "input_gate", num_rows=used)) * take_rows(of_layer, call.rows)
    return norm(project(hidden, w, "input_proj", num_rows=used), w, "input_norm", config=config, num_rows=used)


def _predicted(
    x: Float[Array, "T n E"], w: LayerWeights, altup: AltUp, config: ModelConfig, num_tokens: Int[Array, ""]
) -> Float[Array, "T n E"]:
    """In float32: each stream, and a mix of all of them."""
    n = altup.num_streams
    weights = _modalities(x[:, altup.active], w, config, num_tokens) @ w["stream_predict"].astype(jnp.float32)
    x = x.astype(jnp.float32)
    return x + jnp.einsum("tji,tie->tje", weights.reshape(-1, n, n), x, precision=jax.lax.Precision.HIGHEST)


def _modalities(x: jax.Array, w: LayerWeights, config: ModelConfig, num_rows: Int[Array, ""]) -> Float[Array, "T n"]:
    """What the weights of a mix are linear in, in float32."""
    read = norm(x, w, "stream_router_norm", config=config, num_rows=num_rows) * (1.0 / config.embed_dim)
    return jnp.tanh(linear(read, w["stream_router"], num_rows=num_rows, out_dtype=jnp.float32))
