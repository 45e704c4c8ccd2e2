"""Prepares weights for computation and for snapshots, as their declarations say."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from fastgen_jax.engine.config import ResolvedConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.mla import Expansions, split_by_head
from fastgen_jax.models.params import all_specs, head_spec, stack, unstack
from fastgen_jax.models.sharding import divide_leaf, tensor_mesh
from fastgen_jax.models.weight_spec import Kind, Leaf, Params, WeightSpec
from pallas_kernels import native
from pallas_kernels.grouped_matmul import GroupedWeight
from pallas_kernels.grouped_matmul import prepare as prepare_groups
from pallas_kernels.matmul import Int8Weight, Weight, prepare, quantize_int8

HostWeight = np.ndarray | jax.Array | Int8Weight
"""A weight as loaded from a checkpoint: floating point, or int8 if it is from a quantized snapshot."""


def prepare_leaf(
    spec: WeightSpec, array: HostWeight, model: ModelConfig, config: ResolvedConfig
) -> Weight | GroupedWeight | Expansions:
    """One weight in the form that this platform computes with: matrices are packed or quantized, the rest are arrays.

    `array` is the weight of one layer, or a stack over layers. An `Int8Weight` stays int8.
    """
    dtype = {"weights": config.dtype, "activations": config.activation_dtype, "float32": "float32"}[spec.dtype]
    if config.tensor_parallel is not None:
        return _divided(spec, array, config, dtype)
    quantize = config.quantize if spec.quantizable else None
    scanned = spec.per_layer and config.stack_layers  # a packed weight cannot be sliced by a scan
    if isinstance(array, Int8Weight):
        if scanned:
            return jax.tree.map(jnp.asarray, array)
    elif spec.kind is Kind.HEADS and not scanned and native.available():
        return _expansions(array, dtype, model)
    elif spec.kind not in (Kind.MATRIX, Kind.EXPERTS) or (scanned and quantize is None):
        return jnp.asarray(array, dtype)
    elif scanned:
        return jax.tree.map(jnp.asarray, host_leaf(spec, array, dtype=dtype, quantize=quantize))
    else:
        array = np.asarray(array).astype(dtype)
    make = prepare_groups if spec.kind is Kind.EXPERTS else prepare
    return make(array, quantize=quantize, platform=jax.default_backend(), gated=spec.gated)


def host_leaf(spec: WeightSpec, array: HostWeight, *, dtype: DTypeLike, quantize: str | None) -> np.ndarray | Int8Weight:
    """One weight in the form that snapshots store, on the host: in `dtype`, or an `Int8Weight` if it is quantized."""
    if isinstance(array, Int8Weight):
        return array
    if quantize is None or not spec.quantizable:
        return np.asarray(array).astype(np.float32 if spec.dtype == "float32" else jnp.dtype(dtype))
    values, scales = quantize_int8(np.asarray(array))
    return Int8Weight(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (host arrays, to be saved)


def _expansions(array: np.ndarray | jax.Array, dtype: DTypeLike, model: ModelConfig) -> Expansions:
    """The per-head matrices of latent attention, packed."""
    assert model.mla is not None, "only latent attention has one matrix per head"
    k_up, v_up = split_by_head(np.asarray(array).astype(dtype), model.mla, model.num_heads)
    pack = partial(prepare_groups, platform=jax.default_backend())
    return Expansions(k_up=pack(np.ascontiguousarray(k_up)), v_up=pack(np.ascontiguousarray(v_up)))


def _divided(spec: WeightSpec, array: HostWeight, config: ResolvedConfig, dtype: DTypeLike) -> jax.Array | Int8Weight:
    """One weight sharded over the devices of `config`; one that is sharded already is returned as it is."""
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        return array
    host = host_leaf(spec, array, dtype=dtype, quantize=config.quantize)
    return divide_leaf(spec, host, tensor_mesh(jax.local_devices()[: config.tensor_parallel]))


def prepare_params(params: Params, model: ModelConfig, config: ResolvedConfig) -> Params:
    """`params` with all weights prepared, layers stacked or not as `config` says, and a tied head made explicit.

    Weights that are prepared already are returned as they are.
    """
    specs = {head_spec(model).path: head_spec(model)} | all_specs(model)

    def prepared(path: str, leaf: Leaf) -> Leaf:
        if path not in specs:
            raise ValueError(f"params has {path!r}, which is not a weight of this model; remove it")
        return prepare_leaf(specs[path], leaf, model, config) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    if "lm_head" not in rest and config.tensor_parallel is None and _needs_separate_head(config):
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


def _needs_separate_head(config: ResolvedConfig) -> bool:
    """Whether a tied head needs its own memory, because a prepared matrix is not a plain array.

    The embedding stays an array, because its rows are looked up.
    """
    probe = prepare(np.zeros((8, 8), np.float32), quantize=config.quantize, platform=jax.default_backend())
    return not isinstance(probe, jax.Array)
