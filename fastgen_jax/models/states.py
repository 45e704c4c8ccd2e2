"""Layers with a state: what they keep for a sequence, and what they compute."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import KVCache, StateShapes
from fastgen_jax.core.states import NO_STATES
from fastgen_jax.models.attention import LayerCall, Step
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import ACTIVATIONS, project
from fastgen_jax.models.state_config import DeltaNet, Mamba2, ShortConv
from fastgen_jax.models.state_rows import convolved
from fastgen_jax.models.state_scan import Inputs, States, piece_size, scan
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.norm import rms_norm

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_EPS_OF_LENGTH = 1e-6  # added to the squared length of queries and keys of the delta rule


@lru_cache(maxsize=64)
def state_shapes(config: ModelConfig, platform: str) -> StateShapes:
    """What a sequence keeps in each layer with a state; nothing for models without such layers."""
    state = config.state
    if state is None:
        return NO_STATES
    if isinstance(state, ShortConv):
        return StateShapes(len(state.layers), {"tail": (state.width - 1, config.embed_dim)})
    if isinstance(state, Mamba2):
        heads, key_heads, key_dim, value_dim, rates = state.num_heads, state.num_groups, state.state_dim, state.head_dim, 1
        convolved_dim = state.inner_dim + 2 * key_heads * key_dim
    else:
        heads, key_heads, key_dim, value_dim, rates = (
            state.num_heads,
            state.num_key_heads,
            state.key_dim,
            state.value_dim,
            2,
        )
        convolved_dim = 2 * key_heads * key_dim + heads * value_dim
    of_token = key_heads * key_dim + heads * value_dim + rates * heads
    return StateShapes(
        len(state.layers),
        {
            "tail": (state.width - 1, convolved_dim),
            "matrix": (heads, key_dim, value_dim),
            "recent": (piece_size(platform), of_token),
        },
    )


def with_state(
    x: Float[Array, "T E"], w: LayerWeights, cache: KVCache, step: Step, call: LayerCall, *, config: ModelConfig
) -> tuple[Float[Array, "T inner"], KVCache]:
    """The input of the output projection of a layer with a state, and the cache with the states after this step."""
    assert call.state_row is not None, "the layer has a state"
    compute = {ShortConv: _short_conv, Mamba2: _mamba2, DeltaNet: _delta_net}[type(config.state)]
    return compute(x, w, cache, step, call, config)


def _short_conv(
    x: jax.Array, w: LayerWeights, cache: KVCache, step: Step, call: LayerCall, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    b, c, x = jnp.split(project(x, w, "mix_in", num_rows=step.num_tokens), 3, axis=-1)
    y, cache = _conv(b * x, w, cache, step, call, config)
    return c * y.astype(c.dtype), cache


def _mamba2(
    x: jax.Array, w: LayerWeights, cache: KVCache, step: Step, call: LayerCall, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    state = config.state
    assert isinstance(state, Mamba2)
    h, d, g, n, inner = state.num_heads, state.head_dim, state.num_groups, state.state_dim, state.inner_dim
    num_tokens, dtype = x.shape[0], x.dtype
    y = project(x, w, "mix_in", num_rows=step.num_tokens)
    if state.in_multipliers:
        parts = np.repeat(np.asarray(state.in_multipliers, np.float32), (inner, inner, g * n, g * n, h))
        y = y * jnp.asarray(parts, y.dtype)[None, :]
    gate, mixed, dt = jnp.split(y, (inner, 2 * inner + 2 * g * n), axis=-1)
    mixed, cache = _conv(mixed, w, cache, step, call, config)
    values, b, c = jnp.split(ACTIVATIONS[state.activation](mixed), (inner, inner + g * n), axis=-1)
    dt = jax.nn.softplus(dt.astype(jnp.float32) + w["dt_bias"][None, :])  # [T, H]
    values = values.reshape(num_tokens, h, d)
    inputs = Inputs(
        k=b.reshape(num_tokens, g, n),
        v=dt[..., None] * values,
        decay=-jnp.exp(w["a_log"])[None, :] * dt,
        rate=None,
    )
    out, cache = _scanned(c.reshape(num_tokens, g, n), inputs, cache, step, call, config)
    out = (out + w["d"][None, :, None] * values).reshape(num_tokens, inner)
    gate = jax.nn.silu(gate.astype(jnp.float32))
    if not state.norm_first:
        out = out * gate
    if state.norm_groups:
        out = _rms_norm(out.reshape(num_tokens, state.norm_groups, -1), step, config).reshape(num_tokens, inner)
        out = out * w["mix_norm"].astype(jnp.float32)[None, :]
    if state.norm_first:
        out = out * gate
    return (out * state.out_multiplier).astype(dtype), cache


def _delta_net(
    x: jax.Array, w: LayerWeights, cache: KVCache, step: Step, call: LayerCall, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    state = config.state
    assert isinstance(state, DeltaNet)
    h, k, dk, dv = state.num_heads, state.num_key_heads, state.key_dim, state.value_dim
    num_tokens, dtype = x.shape[0], x.dtype
    mixed, gate = jnp.split(project(x, w, "mix_in", num_rows=step.num_tokens), (2 * k * dk + h * dv,), axis=-1)
    b, a = jnp.split(project(x, w, "mix_gates", num_rows=step.num_tokens).astype(jnp.float32), 2, axis=-1)
    mixed, cache = _conv(mixed, w, cache, step, call, config)
    q, key, value = jnp.split(ACTIVATIONS[state.activation](mixed), (k * dk, 2 * k * dk), axis=-1)
    q, key = (part.reshape(num_tokens, k, dk) for part in (q, key))

    def unit(x: jax.Array, length: float) -> jax.Array:
        scale = jnp.full(dk, length / dk**0.5, jnp.float32)
        return rms_norm(x, scale, eps=_EPS_OF_LENGTH / dk, offset=0.0, num_rows=step.num_tokens)

    inputs = Inputs(
        k=unit(key, 1.0),
        v=value.reshape(num_tokens, h, dv),
        decay=-jnp.exp(w["a_log"])[None, :] * jax.nn.softplus(a + w["dt_bias"][None, :]),
        rate=jax.nn.sigmoid(b),
    )
    out, cache = _scanned(unit(q, dk**-0.5), inputs, cache, step, call, config)
    out = _rms_norm(out, step, config) * w["mix_norm"].astype(jnp.float32)[None, None, :]
    out = out.reshape(num_tokens, h * dv) * jax.nn.silu(gate.astype(jnp.float32))
    return out.astype(dtype), cache


def _rms_norm(x: jax.Array, step: Step, config: ModelConfig) -> jax.Array:
    """`x` along its last axis, without a scale."""
    scale = jnp.ones(x.shape[-1], jnp.float32)
    return rms_norm(x, scale, eps=config.norm_eps, offset=0.0, num_rows=step.num_tokens)


def _conv(
    x: jax.Array, w: LayerWeights, cache: KVCache, step: Step, call: LayerCall, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    """The convolution of a layer, in float32, and the cache with the new tails."""
    assert config.state is not None
    assert step.state is not None
    assert call.state_row is not None
    y, tail = convolved(x, w["conv"], cache.states["tail"], step.state, call.state_row, len(config.state.layers))
    if "conv_bias" in w:
        y = y + w["conv_bias"].astype(jnp.float32)[None, :]
    return y, cache.with_states(tail=tail)


def _scanned(
    q: jax.Array, inputs: Inputs, cache: KVCache, step: Step, call: LayerCall, config: ModelConfig
) -> tuple[jax.Array, KVCache]:
    assert config.state is not None
    assert step.state is not None
    assert call.state_row is not None
    states = States(matrix=cache.states["matrix"], recent=cache.states["recent"])
    out, states = scan(q, inputs, states, step.state, call.state_row, len(config.state.layers))
    return out, cache.with_states(matrix=states.matrix, recent=states.recent)


def refuse_states(config: ModelConfig, what: str) -> None:
    """ValueError for a model that keeps states: `what` has no place for them."""
    if config.state is not None:
        raise ValueError(
            f"{what} is not supported for a {config.family} model, because it keeps a state in the slot of each running "
            "request; use requests, as generate and score do"
        )
