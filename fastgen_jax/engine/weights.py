"""Weights in the form that the device computes with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import Params
from pallas_kernels.matmul import prepare

MATRICES = ("qkv", "o", "gate_up", "down", "lm_head")  # read through `linear`; everything else is a plain array


def prepare_leaf(path: str, array: Any, config: EngineConfig) -> Any:
    """One weight as this platform computes with it: packed or quantised if it is a matrix, else an array in `dtype`.

    `path` is its place in the tree, like "layers.qkv"; `array` is [in, out] for a matrix.
    """
    name = path.rsplit(".", 1)[-1]
    if name in MATRICES and array.ndim == 2:
        return prepare(jnp.asarray(array, config.dtype), quantize=config.quantize, platform=jax.default_backend())
    return jnp.asarray(array, config.dtype)


def prepare_params(params: Params, model: ModelConfig, config: EngineConfig) -> Params:
    """`params` with all matrices prepared, layers stacked or not as `config` says, and a tied head made explicit.

    What is prepared already stays as it is.
    """
    prepared = {name: leaf for name, leaf in params.items() if name != "layers"}
    if "lm_head" not in prepared and _reads_head_differently(config):
        prepared["lm_head"] = jnp.asarray(prepared["embed"]).T  # the embedding itself is still looked up row by row
    prepared = {name: _prepare_plain(name, leaf, config) for name, leaf in prepared.items()}
    layers = params["layers"]
    if isinstance(layers, dict):
        if config.stack_layers and config.quantize is None:
            return {**prepared, "layers": {name: jnp.asarray(leaf, config.dtype) for name, leaf in layers.items()}}
        layers = tuple(
            jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], layers) for i in range(model.num_layers)
        )
    layers = tuple({name: _prepare_plain(name, leaf, config) for name, leaf in layer.items()} for layer in layers)
    if config.stack_layers:
        return {**prepared, "layers": jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *layers)}
    return {**prepared, "layers": layers}


def _prepare_plain(name: str, leaf: Any, config: EngineConfig) -> Any:
    return prepare_leaf(name, leaf, config) if hasattr(leaf, "ndim") else leaf


def _reads_head_differently(config: EngineConfig) -> bool:
    """Whether a matrix in `prepare`'s form is something else than the embedding transposed."""
    probe = prepare(jnp.zeros((8, 8), config.dtype), quantize=config.quantize, platform=jax.default_backend())
    return not isinstance(probe, jax.Array)
