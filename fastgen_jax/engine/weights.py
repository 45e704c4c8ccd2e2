"""Weights in the form that the device computes with."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fastgen_jax.engine.config import ResolvedConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.mla import Expansions, expansions
from fastgen_jax.models.params import EXPERT_MATRICES, Params, param_specs, stack, unstack
from fastgen_jax.models.sharding import divide_leaf, tensor_mesh
from pallas_kernels import native
from pallas_kernels.grouped_matmul import prepare as prepare_groups
from pallas_kernels.matmul import Int8Weight, prepare, quantize_int8

# Read through `linear`; everything else is a plain array.
MATRICES = (
    "qkv",
    "o",
    "q",
    "q_a",
    "q_b",
    "kv_a",
    "gate_up",
    "up",
    "down",
    "lm_head",
    "project_in",
    "project_out",
    "shared_gate_up",
    "shared_down",
    "shared_gate",
    "router",
)
_TABLES = ("embed", "position_embed")
# Scores decide which experts a token meets: the few numbers that int8 or bfloat16 would save are not worth a wrong choice.
_NEVER_QUANTIZED = ("router", "shared_gate")


def is_quantized(name: str, quantize: str | None) -> bool:
    """Whether the weight of this name, without the path before it, is kept as `quantize` says."""
    return quantize is not None and name in (*MATRICES, *EXPERT_MATRICES) and name not in _NEVER_QUANTIZED


def prepare_leaf(path: str, array: Any, model: ModelConfig, config: ResolvedConfig) -> Any:
    """One weight as this platform computes with it: packed or quantised if it is a matrix, else an array.

    Tables that are looked up row by row are in `dtype`, other arrays in that of the activations.

    `path` is its place in the tree, like "layers.qkv"; `array` is a vector, a matrix [in, out], or a stack of either. A
    matrix that is an `Int8Weight` already (of a snapshot) stays int8.
    """
    name = path.rsplit(".", 1)[-1]
    if config.tensor_parallel is not None:
        return _divided(path, array, model, config)
    if name == "choice_bias":  # its steps are finer than bfloat16's
        return jnp.asarray(array, jnp.float32)
    if name in _TABLES:
        return jnp.asarray(array, config.dtype)
    if name == "kv_b" and not config.stack_layers and native.available():
        return _expansions(array, model, config)
    if name not in (*MATRICES, *EXPERT_MATRICES):
        return jnp.asarray(array, config.activation_dtype)
    quantize = config.quantize if is_quantized(name, config.quantize) else None
    if path.startswith("layers.") and config.stack_layers:  # a packed weight cannot be sliced by a scan
        if isinstance(array, Int8Weight):
            return jax.tree_util.tree_map(jnp.asarray, array)
        if quantize is None:
            return jnp.asarray(array, config.dtype)
        values, scales = quantize_int8(np.asarray(array))
        return Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    gated = {
        "gate_up": model.fused_swiglu,
        "shared_gate_up": True,
        "expert_gate_up": model.moe is not None and model.moe.swiglu_limit is None,
    }.get(name, False)
    make = prepare_groups if name in EXPERT_MATRICES else prepare
    dtype = config.activation_dtype if name in _NEVER_QUANTIZED else config.dtype
    plain = array if isinstance(array, Int8Weight) else np.asarray(array).astype(dtype)
    return make(plain, quantize=quantize, platform=jax.default_backend(), gated=gated)


def _expansions(array: Any, model: ModelConfig, config: ResolvedConfig) -> Expansions:
    """Latent attention's matrices, packed by head. Never int8: their results meet every token of the context."""
    assert model.mla is not None, "only latent attention has a kv_b"
    plain = expansions(np.asarray(array).astype(config.dtype), model.mla, model.num_heads)
    pack = partial(prepare_groups, platform=jax.default_backend())
    return Expansions(k_up=pack(np.ascontiguousarray(plain.k_up)), v_up=pack(np.ascontiguousarray(plain.v_up)))


def _divided(path: str, array: Any, model: ModelConfig, config: ResolvedConfig) -> Any:
    """One weight as `divide_leaf` divides it over the devices of `config`; what has been divided before stays."""
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        return array
    spec: Any = param_specs(model)
    for part in path.split("."):
        spec = spec[part]
    host = host_leaf(path, array, dtype=config.dtype, quantize=config.quantize)
    return divide_leaf(spec, host, tensor_mesh(jax.local_devices()[: config.tensor_parallel]))


def host_leaf(path: str, array: Any, *, dtype: Any, quantize: str | None) -> Any:
    """One weight as a snapshot keeps it, on the host: in `dtype`, or an `Int8Weight` if it is a matrix and asked for."""
    name = path.rsplit(".", 1)[-1]
    if isinstance(array, Int8Weight):
        return array
    if name == "choice_bias":
        return np.asarray(array, np.float32)
    if not is_quantized(name, quantize):
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
    if "lm_head" not in rest and config.tensor_parallel is None and _head_is_stored_apart(config):
        rest["lm_head"] = np.asarray(rest["embed"]).T
    rest = {name: prepared(name, leaf) for name, leaf in rest.items()}
    layers = params["layers"]
    if isinstance(layers, dict) and not config.stack_layers:
        layers = unstack(layers, model)
    elif not isinstance(layers, dict) and config.stack_layers:
        layers = stack(layers)
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
