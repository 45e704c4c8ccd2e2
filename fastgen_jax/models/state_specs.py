"""The declarations of the weights of layers with a state."""

from __future__ import annotations

from collections.abc import Iterator

from fastgen_jax.models.state_config import Mamba2, ShortConv, StateConfig
from fastgen_jax.models.weight_spec import WeightSpec, bias, conv, matrix, norm, vector

_GATES = "it decides how fast a state decays; int8 would save little memory and could change what is remembered"


def state_specs(embed_dim: int, state: StateConfig) -> Iterator[WeightSpec]:
    """The specs of the weights of one layer; see `state_config` for what they mean."""
    e = embed_dim
    if isinstance(state, ShortConv):
        weights = matrix("mix_in", (e, 3 * e), ("E", "inner")), conv("conv", (state.width, e)), _out(e, e)
        yield from weights
        if state.bias:
            yield from map(bias, weights)
    elif isinstance(state, Mamba2):
        h, inner = state.num_heads, state.inner_dim
        channels = inner + 2 * state.num_groups * state.state_dim
        mix_in, kernel, out = (
            matrix("mix_in", (e, -(-state.in_dim // state.tile) * state.tile), ("E", "inner")),
            conv("conv", (state.width, channels)),
            _out(inner, e),
        )
        yield from (mix_in, kernel, out)
        yield from _decays(h)
        yield vector("d", h, "heads", dtype="float32")
        if state.norm_groups:
            yield norm("mix_norm", (inner,), ("inner",))
        if state.conv_bias:
            yield bias(kernel)
        if state.bias:
            yield from (bias(mix_in), bias(out))
    else:
        h, values = state.num_heads, state.num_heads * state.value_dim
        channels = 2 * state.num_key_heads * state.key_dim + values
        yield matrix("mix_in", (e, channels + values), ("E", "inner"), parts=(channels, values))
        fill = -2 * h % state.tile
        gates = (h, h, fill) if fill else (h, h)
        yield matrix("mix_gates", (e, sum(gates)), ("E", "heads"), parts=gates, never_quantized=_GATES)
        yield conv("conv", (state.width, channels))
        yield _out(values, e)
        yield from _decays(h)
        yield norm("mix_norm", (state.value_dim,), ("D",))


def _out(inner: int, e: int) -> WeightSpec:
    return matrix("mix_out", (inner, e), ("inner", "E"))


def _decays(num_heads: int) -> Iterator[WeightSpec]:
    yield vector("a_log", num_heads, "heads", dtype="float32")
    yield vector("dt_bias", num_heads, "heads", dtype="float32")
