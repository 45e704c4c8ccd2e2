"""Building blocks of a layer: norms, projections, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.models.adapters import AdaptedWeight, adapted_linear
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.matmul import linear
from pallas_kernels.norm import layer_norm, rms_norm

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# The normal distribution nearest to the squared ReLU (arXiv:2209.10655, appendix).
_LAPLACE_MEAN, _LAPLACE_DEVIATION = 0.707107, 0.282095

_XIELU_BETA, _XIELU_EPS = 0.5, -1e-6  # the same in every release

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_clipped": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10.0, 10.0),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.01),
    "hard_swish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
    "laplace": lambda x: 0.5 * (1.0 + jax.lax.erf((x - _LAPLACE_MEAN) / (_LAPLACE_DEVIATION * math.sqrt(2.0)))),
    "linear": lambda x: x,
}


def xielu(x: Float[Array, "T F"], above: Float[Array, " one"], below: Float[Array, " one"]) -> Float[Array, "T F"]:
    """The activation of Apertus (arXiv:2411.13010), in float32: quadratic above 0, the integral of an exponential below.

    `above` and `below` are its learned parameters; the derivative at 0 is 1/2.
    """
    x32 = x.astype(jnp.float32)
    above, below = (jax.nn.softplus(learned.astype(jnp.float32))[None, :] for learned in (above, below))
    negative = (jnp.expm1(jnp.minimum(x32, _XIELU_EPS)) - x32) * (_XIELU_BETA + below)
    return (jnp.where(x32 > 0.0, above * jnp.square(x32), negative) + _XIELU_BETA * x32).astype(x.dtype)


def norm(
    x: Float[Array, "*rows E"], w: LayerWeights, name: str, *, config: ModelConfig, num_rows: Int[Array, ""] | None = None
) -> Float[Array, "*rows E"]:
    """`x` normalized along its last axis with the weight `w[name]`, as the config says.

    Entries of the first axis from `num_rows` on are padding.
    """
    scale = w[name] if config.norm_scale else jnp.ones(x.shape[-1:], x.dtype)
    if config.norm == "rms":
        return rms_norm(x, scale, eps=config.norm_eps, offset=config.norm_offset, num_rows=num_rows)
    return layer_norm(x, scale, w.get(f"{name}_bias"), eps=config.norm_eps, offset=config.norm_offset, num_rows=num_rows)


def project(
    x: Float[Array, "T inputs"],
    w: LayerWeights,
    name: str,
    *,
    residual: Float[Array, "T outputs"] | None = None,
    num_rows: Int[Array, ""] | None = None,
) -> Float[Array, "T outputs"]:
    """x @ w[name] (+ residual), plus the bias if the layer has one. Rows from `num_rows` on are padding."""
    multiply = adapted_linear if isinstance(w[name], AdaptedWeight) else linear
    y = multiply(x, w[name], residual=residual, num_rows=num_rows)
    return y + w[f"{name}_bias"][None, :] if f"{name}_bias" in w else y


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """`x` squashed smoothly into (-cap, cap); a cap of None returns it unchanged."""
    return x if cap is None else cap * jnp.tanh(x / cap)
