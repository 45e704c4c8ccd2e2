"""Weights in the form that the device computes with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.engine.config import ResolvedConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import Params
from pallas_kernels.matmul import Int8Weight, prepare, quantize_int8

MATRICES = ("qkv", "o", "gate_up", "down", "lm_head")  # read through `linear`; everything else is a plain array


def prepare_leaf(path: str, array: Any, model: ModelConfig, config: ResolvedConfig) -> Any:
    """One weight as this platform computes with it: packed or quantised if it is a matrix, else an array in `dtype`.

    `path` is its place in the tree, like "layers.qkv"; `array` is a vector, a matrix [in, out], or a stack of either. A
    matrix that is an `Int8Weight` already (of a snapshot) stays int8.
    """
    name = path.rsplit(".", 1)[-1]
    if isinstance(array, Int8Weight):
        if path.startswith("layers.") and config.stack_layers:
            return jax.tree_util.tree_map(jnp.asarray, array)
        return prepare(array, platform=jax.default_backend(), gated=name == "gate_up" and not model.mlp_bias)
    if name not in MATRICES:
        return jnp.asarray(array, config.dtype)
    if path.startswith("layers.") and config.stack_layers:  # a packed weight cannot be sliced by a scan
        if config.quantize is None:
            return jnp.asarray(array, config.dtype)
        values, scales = quantize_int8(np.asarray(array))
        return Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    return prepare(
        np.asarray(array).astype(config.dtype), quantize=config.quantize, platform=jax.default_backend(),
        gated=name == "gate_up" and not model.mlp_bias,
    )


def host_leaf(path: str, array: Any, *, dtype: Any, quantize: str | None) -> Any:
    """One weight as a snapshot keeps it, on the host: in `dtype`, or an `Int8Weight` if it is a matrix and asked for."""
    if isinstance(array, Int8Weight):
        return array
    if quantize is None or path.rsplit(".", 1)[-1] not in MATRICES:
        return np.asarray(array).astype(jnp.dtype(dtype))
    values, scales = quantize_int8(np.asarray(array))
    return Int8Weight(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (host arrays, to be saved)


def prepare_params(params: Params, model: ModelConfig, config: ResolvedConfig) -> Params:
    """`params` with all matrices prepared, layers stacked or not as `config` says, and a tied head made explicit.

    What is prepared already stays as it is.
    """

    def prepared(path: str, leaf: Any) -> Any:
        return prepare_leaf(path, leaf, model, config) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    if "lm_head" not in rest and _head_is_stored_apart(config):
        rest["lm_head"] = np.asarray(rest["embed"]).T
    rest = {name: prepared(name, leaf) for name, leaf in rest.items()}
    layers = params["layers"]
    if isinstance(layers, dict) and not config.stack_layers:
        layers = tuple(jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], layers) for i in range(model.num_layers))
    elif not isinstance(layers, dict) and config.stack_layers:
        layers = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *layers)
    if isinstance(layers, dict):
        return {**rest, "layers": {name: prepared(f"layers.{name}", leaf) for name, leaf in layers.items()}}
    layers = tuple({name: prepared(f"layers.{name}", leaf) for name, leaf in layer.items()} for layer in layers)
    return {**rest, "layers": layers}


def _head_is_stored_apart(config: ResolvedConfig) -> bool:
    """Whether a tied head is worth its own memory: where a prepared matrix is not just an array.

    The embedding itself stays as it is, because it is looked up row by row.
    """
    probe = prepare(np.zeros((8, 8), np.float32), quantize=config.quantize, platform=jax.default_backend())
    return not isinstance(probe, jax.Array)
