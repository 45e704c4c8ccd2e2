"""Layers with a state: what they keep for a sequence, and what they compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.core import KVCache, StateShapes
from fastgen_jax.core.states import NO_STATES
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import ACTIVATIONS, project
from fastgen_jax.models.sharding import TENSOR, divide_state
from fastgen_jax.models.state_config import DeltaNet, Mamba2, ShortConv, StateConfig
from fastgen_jax.models.state_division import state_of_device
from fastgen_jax.models.state_rows import StateRows, convolved
from fastgen_jax.models.state_scan import Inputs, States, piece_size, scan
from fastgen_jax.models.state_specs import state_specs
from fastgen_jax.models.step import LayerCall, Step
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels import recurrence
from pallas_kernels.norm import rms_norm
from pallas_kernels.ordered_sum import ordered_sum_of_few

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_EPS_OF_LENGTH = 1e-6  # added to the squared length of queries and keys of the delta rule

Pools = dict[str, jax.Array]  # the states of `KVCache`


def state_shapes(config: ModelConfig, platform: str) -> StateShapes:
    """What a sequence keeps in each layer with a state; nothing for models without such layers.

    Native kernels keep the state after the last token; without them `state_scan` also keeps the inputs of some tokens.
    """
    if config.state is None:
        return NO_STATES
    return _shapes(config, None if platform == "cpu" and recurrence.available() else piece_size(platform))


@lru_cache(maxsize=64)
def _shapes(config: ModelConfig, piece: int | None) -> StateShapes:
    state = config.state
    assert state is not None
    if isinstance(state, ShortConv):
        return StateShapes(len(state.layers), {"tail": ((state.width - 1) * config.embed_dim,)})
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
    shapes: dict[str, tuple[int, ...]] = {
        "tail": ((state.width - 1) * convolved_dim,),
        "matrix": (heads, key_dim, value_dim),
    }
    if piece is not None:
        flat = key_heads * key_dim + heads * value_dim + rates * heads
        shapes["recent"] = (piece, -(-flat // state.tile) * state.tile)
    return StateShapes(len(state.layers), shapes)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """What a layer's functions need besides its weights and states; on several devices, the part of one of them."""

    state: StateConfig
    rows: StateRows
    row: jax.Array | int
    """Its number among the layers with a state."""
    num_tokens: jax.Array
    eps: float
    norm_axis: str | None
    """Name of the axis of devices over whose values the norm averages; None: over those of this one."""
    in_order: bool
    """Whether it adds them up in the order of the devices."""


def with_state(
    x: Float[Array, "T E"], w: LayerWeights, cache: KVCache, step: Step, call: LayerCall, *, config: ModelConfig
) -> tuple[Float[Array, "T inner"], KVCache]:
    """The input of the output projection of a layer with a state, and the cache with the states after this step."""
    state, rows, row = config.state, step.state, call.state_row
    assert state is not None
    assert rows is not None
    assert row is not None, "the layer has a state"
    y = project(x, w, "mix_in", num_rows=step.num_tokens)
    gates = project(x, w, "mix_gates", num_rows=step.num_tokens).astype(jnp.float32) if "mix_gates" in w else None
    specs = {spec.name: spec for spec in state_specs(config.embed_dim, state)}
    small = {name: w[name] for name, spec in specs.items() if not spec.is_product and (spec.bias_of or name) in _SMALL}
    mesh = step.mesh
    part = state if mesh is None else state_of_device(state, mesh.size)

    def run(
        y: jax.Array,
        gates: jax.Array | None,
        weights: dict[str, jax.Array],
        states: Pools,
        rows: dict[str, jax.Array],
        row: jax.Array | int,
        num_tokens: jax.Array,
    ) -> tuple[jax.Array, Pools]:
        layer = _Layer(
            state=part,
            rows=StateRows(**rows),
            row=row,
            num_tokens=num_tokens,
            eps=config.norm_eps,
            in_order=step.sums_in_order,
            norm_axis=TENSOR if mesh is not None and isinstance(state, Mamba2) and state.norm_groups == 1 else None,
        )
        if isinstance(part, ShortConv):
            return _short_conv(y, weights, states, layer)
        return (
            _mamba2(y, weights, states, layer) if isinstance(part, Mamba2) else _delta_net(y, gates, weights, states, layer)
        )

    if mesh is not None:
        run = divide_state(run, mesh, specs)
    out, states = run(y, gates, small, cache.states, vars(rows), row, step.num_tokens)
    return out, dataclasses.replace(cache, states=states)


_SMALL = ("conv", "a_log", "dt_bias", "d", "mix_norm")  # what the functions below read; they get the products


def _short_conv(y: jax.Array, w: LayerWeights, states: Pools, layer: _Layer) -> tuple[jax.Array, Pools]:
    b, c, x = jnp.split(y, 3, axis=-1)
    y, states = _conv(b * x, 0, w, states, layer)
    return c * y.astype(c.dtype), states


def _mamba2(y: jax.Array, w: LayerWeights, states: Pools, layer: _Layer) -> tuple[jax.Array, Pools]:
    state = layer.state
    assert isinstance(state, Mamba2)
    h, d, g, n, inner = state.num_heads, state.head_dim, state.num_groups, state.state_dim, state.inner_dim
    num_tokens, dtype = y.shape[0], y.dtype
    y = y[:, : state.in_dim]
    if state.in_multipliers:
        parts = np.repeat(np.asarray(state.in_multipliers, np.float32), (inner, inner, g * n, g * n, h))
        y = y * jnp.asarray(parts, y.dtype)[None, :]
    mixed, states = _conv(y, inner, w, states, layer, state.activation)
    values, b, c = jnp.split(mixed, (inner, inner + g * n), axis=-1)
    gate, dt = y[:, :inner], y[:, 2 * (inner + g * n) :]
    dt = jax.nn.softplus(dt.astype(jnp.float32) + w["dt_bias"][None, :])  # [T, H]
    values = values.reshape(num_tokens, h, d)
    q, k = (part.reshape(num_tokens, g, n) for part in (c, b))
    out, states = _scanned(q, k, values, -jnp.exp(w["a_log"])[None, :] * dt, dt, states, layer, delta=False)
    out = (out + w["d"][None, :, None] * values).reshape(num_tokens, inner)
    gate = jax.nn.silu(gate.astype(jnp.float32))
    if not state.norm_first:
        out = out * gate
    if layer.norm_axis is not None:
        mean = _mean_over_devices(jnp.mean(jnp.square(out), axis=-1, keepdims=True), layer.norm_axis, layer.in_order)
        out = out * jax.lax.rsqrt(mean + layer.eps)
    elif state.norm_groups:
        out = _rms_norm(out.reshape(num_tokens, state.norm_groups, -1), layer).reshape(num_tokens, inner)
    if state.norm_groups:
        out = out * w["mix_norm"].astype(jnp.float32)[None, :]
    if state.norm_first:
        out = out * gate
    return (out * state.out_multiplier).astype(dtype), states


def _mean_over_devices(mean: jax.Array, axis: str, in_order: bool) -> jax.Array:
    """The mean of the means of all devices."""
    if not in_order:
        return jax.lax.pmean(mean, axis)
    return ordered_sum_of_few(mean, axis) / jax.lax.psum(1, axis)


def _delta_net(
    y: jax.Array, gates: jax.Array | None, w: LayerWeights, states: Pools, layer: _Layer
) -> tuple[jax.Array, Pools]:
    state = layer.state
    assert isinstance(state, DeltaNet)
    assert gates is not None
    h, k, dk, dv = state.num_heads, state.num_key_heads, state.key_dim, state.value_dim
    num_tokens, dtype, channels = y.shape[0], y.dtype, 2 * state.num_key_heads * state.key_dim + h * dv
    b, a = gates[:, :h], gates[:, h : 2 * h]
    mixed, states = _conv(y, 0, w, states, layer, state.activation)
    q, key, value = jnp.split(mixed, (k * dk, 2 * k * dk), axis=-1)
    q, key = (part.reshape(num_tokens, k, dk) for part in (q, key))

    def unit(x: jax.Array, length: float) -> jax.Array:
        scale = jnp.full(dk, length / dk**0.5, jnp.float32)
        return rms_norm(x, scale, eps=_EPS_OF_LENGTH / dk, offset=0.0, num_rows=layer.num_tokens)

    decay = -jnp.exp(w["a_log"])[None, :] * jax.nn.softplus(a + w["dt_bias"][None, :])
    value = value.reshape(num_tokens, h, dv)
    out, states = _scanned(unit(q, dk**-0.5), unit(key, 1.0), value, decay, jax.nn.sigmoid(b), states, layer, delta=True)
    out = _rms_norm(out, layer) * w["mix_norm"].astype(jnp.float32)[None, None, :]
    out = out.reshape(num_tokens, h * dv) * jax.nn.silu(y[:, channels:].astype(jnp.float32))
    return out.astype(dtype), states


def _rms_norm(x: jax.Array, layer: _Layer) -> jax.Array:
    """`x` along its last axis, without a scale."""
    scale = jnp.ones(x.shape[-1], jnp.float32)
    return rms_norm(x, scale, eps=layer.eps, offset=0.0, num_rows=layer.num_tokens)


def _conv(
    x: jax.Array, column: int, w: LayerWeights, states: Pools, layer: _Layer, activation: str = "linear"
) -> tuple[jax.Array, Pools]:
    """The convolution of the columns of `x` from `column` on, in float32, and the states with the new tails."""
    kernel, bias, tails = w["conv"], w.get("conv_bias"), states["tail"]
    width, channels = kernel.shape
    num_layers = len(layer.state.layers)

    def in_xla(x: jax.Array, tails: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x[:, column : column + channels]
        y, tails = convolved(x, kernel, tails, layer.rows, layer.row, num_layers)
        if bias is not None:
            y = y + bias.astype(jnp.float32)[None, :]
        return ACTIVATIONS[activation](y), tails

    def native(x: jax.Array, tails: jax.Array) -> tuple[jax.Array, jax.Array]:
        chunks = _chunks(layer, tails)
        y, tails = recurrence.convolution(x, kernel, bias, tails, chunks, column=column, silu=activation == "silu")
        return y if activation == "silu" else ACTIVATIONS[activation](y), tails

    kernels = {"cpu": native} if 2 <= width <= recurrence.MAX_WIDTH and recurrence.available() else {}
    y, tails = jax.lax.platform_dependent(x, tails, **kernels, default=in_xla)
    return y, states | {"tail": tails}


def _scanned(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    gain: jax.Array,
    states: Pools,
    layer: _Layer,
    *,
    delta: bool,
) -> tuple[jax.Array, Pools]:
    """The results of the recurrence (see `pallas_kernels.recurrence`), and the states after this step."""
    matrix = states["matrix"]
    if "recent" not in states:
        out, matrix = recurrence.recurrence(q, k, v, decay, gain, matrix, _chunks(layer, matrix), delta=delta)
        return out, states | {"matrix": matrix}
    inputs = Inputs(k=k, v=v if delta else gain[..., None] * v, decay=decay, rate=gain if delta else None)
    pools = States(matrix=matrix, recent=states["recent"])
    out, pools = scan(q, inputs, pools, layer.rows, layer.row, len(layer.state.layers))
    return out, states | {"matrix": pools.matrix, "recent": pools.recent}


def _chunks(layer: _Layer, pool: jax.Array) -> recurrence.Chunks:
    rows = layer.rows
    places = rows.places(layer.row, pool.shape[0], len(layer.state.layers))
    return recurrence.Chunks(places=places, starts=rows.starts, stops=rows.stops, first_tokens=rows.first_tokens)


def refuse_states(config: ModelConfig, what: str) -> None:
    """ValueError for a model that keeps states: `what` has no place for them."""
    if config.state is not None:
        raise ValueError(
            f"{what} is not supported for a {config.family} model, because it keeps a state in the slot of each running "
            "request; use requests, as generate and score do"
        )
