"""The parts that every layer is made of: norms, projections, activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fastgen_jax.models.config import ModelConfig
from pallas_kernels.matmul import linear

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def norm(x: jax.Array, w: Mapping[str, Any], name: str, *, config: ModelConfig) -> jax.Array:
    """`x` normalised along its last axis with the weight `w[name]`, as the config says."""
    if config.norm == "rms":
        return rms_norm(x, w[name], eps=config.norm_eps, offset=config.norm_offset)
    return layer_norm(x, w[name], w.get(f"{name}_bias"), eps=config.norm_eps)


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float = 0.0) -> jax.Array:
    """`x` over its root mean square along the last axis, times `weight + offset`; in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32)
    return (x32 * scale * (weight + offset if offset else weight)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *, eps: float) -> jax.Array:
    """`x` with mean 0 and variance 1 along the last axis, times `weight`, plus `bias`; in float32 (arXiv:1607.06450)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = x32 * scale * weight.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def project(
    x: jax.Array,
    w: Mapping[str, Any],
    name: str,
    *,
    residual: jax.Array | None = None,
    num_rows: jax.Array | None = None,
) -> jax.Array:
    """x @ w[name] (+ residual), plus the bias if the layer has one. Rows from `num_rows` on are padding."""
    y = linear(x, w[name], residual=residual, num_rows=num_rows)
    return y + w[f"{name}_bias"] if f"{name}_bias" in w else y


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`x` bent smoothly into (-cap, cap); None leaves it."""
    return x if cap is None else cap * jnp.tanh(x / cap)
