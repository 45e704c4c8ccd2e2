"""The feed-forward half of a layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import ACTIVATIONS, project
from fastgen_jax.models.moe import moe
from pallas_kernels.matmul import swiglu


def mlp(
    x: jax.Array, w: dict[str, Any], *, config: ModelConfig, used: jax.Array, residual: jax.Array | None
) -> jax.Array:
    """The MLP or the experts of `x` [T, E] (+ residual), whichever the weights `w` of the layer are for.

    `used` bool[T] marks the tokens that are no padding.
    """
    if "router" in w:
        assert config.moe is not None, "a layer with a router has experts"
        return moe(x, w, config=config.moe, used=used, residual=residual)
    return project(_hidden(x, w, config), w, "down", residual=residual)


def _hidden(x: jax.Array, w: dict[str, Any], config: ModelConfig) -> jax.Array:
    """The hidden units [T, F], before the projection back to E."""
    activation = ACTIVATIONS[config.activation]
    if not config.mlp_gated:
        return activation(project(x, w, "up"))
    if config.fused_swiglu:
        return swiglu(x, w["gate_up"])
    gate, up = jnp.split(project(x, w, "gate_up"), 2, axis=-1)
    return activation(gate) * up
