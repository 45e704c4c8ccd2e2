"""Prepares weights for computation and for snapshots, as their declarations say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from fastgen_jax.checkpoint import Checkpoint, kept_in_blocks
from fastgen_jax.checkpoint.layer_stack import LayerStack
from fastgen_jax.checkpoint.snapshot_blocks import stored_blocks
from fastgen_jax.engine.footprint import quantization_of
from fastgen_jax.engine.kept_forms import Form, in_form
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import divided_array, divided_shape, keeps_blocks
from fastgen_jax.models.mla import Expansions, split_by_head
from fastgen_jax.models.params import all_specs, head_spec, plain_name, stack, unstack
from fastgen_jax.models.sharding import divide_array, divide_leaf, place_leaf, tensor_mesh
from fastgen_jax.models.targets import MLP
from fastgen_jax.models.weight_spec import Kind, LayerWeights, Leaf, Params, WeightSpec
from pallas_kernels.grouped_matmul import BlockGroups, GroupedWeight
from pallas_kernels.grouped_matmul import prepare as prepare_groups
from pallas_kernels.matmul import (
    BLOCK_SIZES,
    FLOAT8_BLOCK,
    INT4_ROWS,
    BlockWeight,
    Float8Weight,
    Int4Weight,
    Int8Weight,
    ScaledWeight,
    Weight,
    halves,
    pack_int4,
    prepare,
    quantize_float8,
    quantize_int4,
    quantize_int8,
)

_Leaf = TypeVar("_Leaf")
HostWeight = np.ndarray | jax.Array | Int8Weight | BlockWeight | BlockGroups
"""A weight as loaded from a checkpoint: floating point, int8 from a quantized snapshot, or in the blocks of the file."""


def prepare_leaf(
    spec: WeightSpec, array: HostWeight, model: ModelConfig, config: ResolvedConfig
) -> Weight | GroupedWeight | Expansions:
    """One weight in the form that this platform computes with: matrices are packed or quantized, the rest are arrays.

    `array` is the weight of one layer; unless it is to be packed, it may also be a stack over layers. An `Int8Weight` stays
    int8.
    """
    return _as_multiplied(spec, _prepared(spec, array, model, config), model, config)


def _as_multiplied(spec: WeightSpec, leaf: Leaf, model: ModelConfig, config: ResolvedConfig) -> Leaf:
    """A prepared weight that says whether rows of activations are rounded, too, and how the GPU here reads it."""
    leaf = _in_order(spec, leaf)
    if config.quantize != "w8a8" or not isinstance(leaf, Int8Weight):
        return leaf
    return replace(leaf, rounds_rows=_quantization(spec, model, config, jax.default_backend()) == "w8a8")


def _in_order(spec: WeightSpec, leaf: _Leaf) -> _Leaf:
    """`leaf`, on the host or on devices, with its inputs last if it is multiplied in halves."""
    if (
        not isinstance(leaf, Int8Weight)
        or spec.kind is not Kind.MATRIX
        or leaf.inputs_last
        or not halves.is_used(leaf.shape)
    ):
        return leaf
    if isinstance(leaf.values, np.ndarray):
        return replace(leaf, values=np.ascontiguousarray(leaf.values.swapaxes(-1, -2)), inputs_last=True)
    return replace(leaf, values=jnp.swapaxes(leaf.values, -1, -2), inputs_last=True)


def _prepared(
    spec: WeightSpec, array: HostWeight, model: ModelConfig, config: ResolvedConfig
) -> Weight | GroupedWeight | Expansions:
    if config.num_adapters and plain_name(spec.name) in MLP:
        spec = replace(spec, gated=False)  # the change of an adapter comes before the activation
    dtype = {"weights": config.dtype, "activations": config.activation_dtype, "float32": "float32"}[spec.dtype]
    if config.tensor_parallel is not None:
        return _divided(spec, array, model, config, dtype)
    platform = jax.default_backend()
    if isinstance(array, BlockWeight | BlockGroups) and spec.path in config.kept_forms:
        kept = _kept(array, config.kept_forms[spec.path])
        return jax.tree.map(jnp.asarray, _filled_up(spec, kept, model, platform))
    quantize = _quantization(spec, model, config, platform)
    if config.quantize == "int4" and not config.packed_weights and isinstance(array, BlockWeight | BlockGroups):
        array = array.dequantize()
    in_blocks = isinstance(array, BlockWeight | BlockGroups)
    if config.quantize == "fp8" and (in_blocks or (quantize == "fp8" and not isinstance(array, Int8Weight))):
        blocks = platform != "tpu"  # which multiplies without rounding activations then
        leaf = host_leaf(spec, array, dtype=dtype, quantize=quantize, blocks=blocks)
        return jax.tree.map(jnp.asarray, _filled_up(spec, leaf, model, platform))
    if isinstance(array, BlockWeight):
        return prepare(array, platform="cpu", gated=spec.gated, dtype=dtype)
    if isinstance(array, BlockGroups):
        return prepare_groups(array, platform="cpu", gated=spec.gated, dtype=dtype)
    if not (config.packed_weights and spec.is_product):
        filled = _filled_up(spec, array, model, platform)
        if quantize is None and not isinstance(filled, ScaledWeight):
            return jnp.asarray(filled, dtype)
        assert not isinstance(filled, Int4Weight | Float8Weight), "only the forms of host weights"
        leaf = host_leaf(spec, filled, dtype=dtype, quantize=quantize, platform=platform)
        return jax.tree.map(jnp.asarray, _in_order(spec, leaf))
    if not isinstance(array, Int8Weight):
        array = np.asarray(array).astype(dtype, copy=False)
        if spec.kind is Kind.HEADS:
            return _expansions(array, model)
    if spec.kind is Kind.EXPERTS:
        return prepare_groups(array, quantize=quantize, platform="cpu", gated=spec.gated, dtype=dtype)
    return prepare(array, quantize=quantize, platform="cpu", gated=spec.gated, dtype=dtype)


def host_leaf(
    spec: WeightSpec,
    array: HostWeight,
    *,
    dtype: DTypeLike,
    quantize: str | None,
    blocks: bool = False,
    platform: str = "cpu",
) -> np.ndarray | ScaledWeight:
    """One weight on the host, in `dtype` or, if it is quantized, with scales. Snapshots store the former and int8.

    With `blocks`, 8-bit floats with scales of blocks keep them. `platform` is where int4 is multiplied.
    """
    if isinstance(array, Int8Weight):
        return array
    if quantize is None or not spec.quantizable:
        array = array.dequantize() if isinstance(array, BlockWeight) else array
        return np.asarray(array).astype(np.float32 if spec.dtype == "float32" else jnp.dtype(dtype))
    if quantize == "fp8":
        values, scales = _float8(array, blocks=blocks)
        return Float8Weight(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (host arrays)
    if quantize == "int4":
        return _int4(np.asarray(array), platform)
    values, scales = quantize_int8(np.asarray(array))
    return Int8Weight(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (host arrays, to be saved)


def snapshot_leaf(spec: WeightSpec, array: HostWeight, *, dtype: DTypeLike, quantize: str | None) -> Leaf:
    """One weight on the host as a snapshot stores it: in the blocks of the checkpoint, or quantized, or in `dtype`.

    With "int4", blocks of 32 inputs, or int8 where `quantization_of` says so; with "fp8", one scale for each output, which
    all of its blocks have.
    """
    if isinstance(array, BlockWeight | BlockGroups):
        return stored_blocks(array)
    form = quantization_of(spec, quantize, packed=True)
    if form == "int4":
        return stored_blocks(_in_groups(np.asarray(array), quantize_int4))
    if form == "fp8":
        return stored_blocks(_in_groups(np.asarray(array), _float8_blocks))
    return host_leaf(spec, array, dtype=dtype, quantize=form)


def kept_by_snapshot(checkpoint: Checkpoint, quantize: str | None) -> bool | Literal["fp8"] | Collection[str]:
    """The weights of a checkpoint that stay in its blocks in a snapshot: all, or those of the format to quantize to."""
    if quantize == "fp8":
        return "fp8"
    if quantize != "int4":
        return quantize is None
    specs = all_specs(checkpoint.config)
    return [
        path
        for path, kind in kept_in_blocks(checkpoint).items()
        if not kind.is_float and kind.value_bits == 4 and kind.size % INT4_ROWS == 0 and path in specs
        if quantization_of(specs[path], "int4", packed=True) == "int4"
    ]


def _in_groups(array: np.ndarray, quantized: Callable[[np.ndarray], BlockWeight]) -> BlockWeight | BlockGroups:
    """A matrix, or those of experts, in blocks."""
    if array.ndim == 2:
        return quantized(array)
    return BlockGroups(shape=array.shape, read=lambda number: quantized(array[number]))


def _float8_blocks(array: np.ndarray) -> BlockWeight:
    """A matrix in 8-bit floats with one scale for each output, which all of its blocks have."""
    values, scales = quantize_float8(array)
    # Blocks of 128 would be multiplied as such.
    size = max((each for each in BLOCK_SIZES if len(array) % each == 0 and each != FLOAT8_BLOCK), default=0)
    if not size:
        raise ValueError(
            f"fp8 has blocks of a multiple of {BLOCK_SIZES[0]} inputs, but a weight has {len(array)}; use quantize='int8'"
        )
    return BlockWeight(values=values, scales=np.repeat(scales[:, None], len(array) // size, axis=1))


def _quantization(spec: WeightSpec, model: ModelConfig, config: ResolvedConfig, platform: str) -> str | None:
    """The format of a weight in an engine with this config."""
    num_devices, packed = config.tensor_parallel or 1, config.packed_weights
    divided = spec if packed else replace(spec, shape=divided_shape(spec, model, num_devices, platform))
    return quantization_of(divided, config.quantize, packed=packed, num_devices=num_devices, platform=platform)


def _int4(array: np.ndarray, platform: str) -> Int4Weight:
    """A matrix, or those of experts, quantized on the host."""
    if array.ndim > 2:
        return jax.tree.map(lambda *parts: np.stack(parts), *(_int4(group, platform) for group in array))
    return pack_int4(quantize_int4(array), scale_dtype="float32" if platform == "tpu" else None)  # TPUs have no float16


def _kept(array: BlockWeight | BlockGroups, form: Form) -> Int4Weight | Float8Weight:
    """The numbers of a checkpoint, on the host."""
    if isinstance(array, BlockWeight):
        return in_form(array, form)
    return jax.tree.map(lambda *parts: np.stack(parts), *(in_form(array.read(i), form) for i in range(array.shape[0])))


def _float8(array: np.ndarray | jax.Array | BlockWeight | BlockGroups, *, blocks: bool) -> tuple[np.ndarray, np.ndarray]:
    """(8-bit floats [..., out, in], scales [..., out] or of blocks [..., in / 128, out]).

    They are those of a checkpoint, if it has one scale for each output or one for every 128 inputs.
    """
    if isinstance(array, BlockGroups):
        values, scales = zip(*(_float8(array.read(group), blocks=blocks) for group in range(array.shape[0])), strict=True)
        return np.stack(values), np.stack(scales)
    if not isinstance(array, BlockWeight):
        return quantize_float8(np.asarray(array))
    if blocks and array.size == FLOAT8_BLOCK:  # not by the scales, so that all layers have one form
        return array.values, np.ascontiguousarray(array.scales.T)
    if (array.scales == array.scales[:, :1]).all():
        return array.values, array.scales[:, 0]
    return quantize_float8(array.dequantize())


def _expansions(array: np.ndarray, model: ModelConfig) -> Expansions:
    """The per-head matrices of latent attention, packed."""
    assert model.mla is not None, "only latent attention has one matrix per head"
    k_up, v_up = split_by_head(array, model.mla, model.num_heads)
    pack = partial(prepare_groups, platform="cpu")
    return Expansions(k_up=pack(np.ascontiguousarray(k_up)), v_up=pack(np.ascontiguousarray(v_up)))


def _filled_up(
    spec: WeightSpec, array: np.ndarray | jax.Array | ScaledWeight, model: ModelConfig, platform: str
) -> np.ndarray | jax.Array | ScaledWeight:
    """A weight with the widths that the kernels of the platform need."""
    if not _has_other_widths(spec, array, model, platform):
        return array
    if isinstance(array, Int4Weight):  # numbers of a checkpoint stay only if their inputs are as they are
        fill_columns = partial(divided_array, spec, config=model, num_devices=1, platform=platform, axes=[-1], fill=0)
        return jax.tree.map(lambda part: fill_columns(array=part), array)
    fill = partial(_filled_parts, spec, model=model, platform=platform)
    if isinstance(array, Int8Weight):
        values, scales = fill(np.asarray(array.values), np.asarray(array.scales))
        return Int8Weight(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (host arrays)
    if isinstance(array, Float8Weight):
        values = np.asarray(array.values).swapaxes(-1, -2)
        values, scales = fill(values, np.asarray(array.scales), of_blocks=array.in_blocks)
        return Float8Weight(values=values.swapaxes(-1, -2), scales=scales)  # pyright: ignore[reportArgumentType]
    every_axis = range(-len(spec.axes), 0)
    return divided_array(spec, np.asarray(array), model, 1, axes=every_axis, fill=0, platform=platform)


def _has_other_widths(
    spec: WeightSpec, array: np.ndarray | jax.Array | ScaledWeight, model: ModelConfig, platform: str
) -> bool:
    wanted = divided_shape(spec, model, 1, platform)
    return array.shape[-len(wanted) :] != wanted


def _filled_parts(
    spec: WeightSpec,
    values: np.ndarray,
    scales: np.ndarray,
    *,
    model: ModelConfig,
    platform: str,
    of_blocks: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The same of values [..., in, out] and scales [..., out] of outputs, or [in / size, out] of blocks of inputs."""
    every_axis = range(-len(spec.axes), 0)
    fill = partial(divided_array, spec, config=model, num_devices=1, platform=platform)
    axes = [-1] if of_blocks else [axis for axis in every_axis if axis != -2]
    return fill(array=values, axes=every_axis, fill=0), fill(array=scales, axes=axes, fill=1)


def _divided(
    spec: WeightSpec, array: HostWeight, model: ModelConfig, config: ResolvedConfig, dtype: DTypeLike
) -> jax.Array | ScaledWeight:
    """One weight sharded over the devices of `config`; one that is sharded already is returned as it is."""
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        devices = sorted(array.sharding.device_set, key=lambda device: device.id)
        wanted = divided_shape(spec, model, len(devices), devices[0].platform)
        if array.shape[-len(wanted) :] == wanted:
            return array
    mesh = tensor_mesh(jax.local_devices()[: config.tensor_parallel])
    num_devices, platform = mesh.size, mesh.devices.flat[0].platform
    quantize = _quantization(spec, model, config, platform)
    blocks = spec.quantizable and platform != "tpu" and keeps_blocks(spec, FLOAT8_BLOCK, model, num_devices, platform)
    if isinstance(array, BlockWeight | BlockGroups) and spec.path in config.kept_forms:
        return divide_leaf(spec, _kept(array, config.kept_forms[spec.path]), mesh, model)
    if config.quantize == "int4" and isinstance(array, BlockWeight | BlockGroups):
        array = array.dequantize()
    if quantize == "int4" and isinstance(array, jax.Array | np.ndarray):
        return place_leaf(spec, _int4(divide_array(spec, array, mesh, model), platform), mesh)
    leaf = host_leaf(spec, array, dtype=dtype, quantize=quantize, blocks=blocks)
    return divide_leaf(spec, _in_order(spec, leaf), mesh, model)


def prepare_params(params: Params, model: ModelConfig, config: ResolvedConfig) -> Params:
    """`params` with all weights prepared, layers stacked or not as `config` says, and a tied head made explicit.

    Weights that are prepared already are returned as they are.
    """
    specs = {head_spec(model).path: head_spec(model)} | all_specs(model)

    def prepared(path: str, leaf: Leaf) -> Leaf:
        if path not in specs:
            raise ValueError(f"params has {path!r}, which is not a weight of this model; remove it")
        plain = isinstance(leaf, jax.Array | np.ndarray) or (config.packed_weights and isinstance(leaf, Int8Weight))
        return prepare_leaf(specs[path], leaf, model, config) if plain else _as_multiplied(specs[path], leaf, model, config)

    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    if "lm_head" not in rest and config.tensor_parallel is None and _needs_separate_head(config):
        width = model.embed_proj_dim or model.embed_dim
        rest["lm_head"] = np.asarray(rest["embed"]).T[:width]
    rest = {name: prepared(name, leaf) for name, leaf in rest.items()}
    layers = params["layers"]
    if not config.stack_layers:
        layers = unstack(layers, model) if isinstance(layers, dict) else layers
        layers = tuple({name: prepared(f"layers.{name}", leaf) for name, leaf in layer.items()} for layer in layers)
        return {**rest, "layers": layers}
    if not isinstance(layers, dict):
        layers = _rows_by_name(layers) if config.packed_weights else stack(layers)

    def prepared_stack(path: str, leaf: Leaf | list[Leaf]) -> Leaf:
        packs = config.packed_weights and path in specs and specs[path].is_product
        if packs and isinstance(leaf, jax.Array | np.ndarray | Int8Weight):
            leaf = [jax.tree.map(lambda x, row=row: np.asarray(x)[row], leaf) for row in range(leaf.shape[0])]
        if not isinstance(leaf, list):
            return prepared(path, leaf)
        whole = LayerStack(path, len(leaf))
        for row, array in enumerate(leaf):
            whole.set_row(row, prepared(path, array))
        return whole.leaf()

    return {**rest, "layers": {name: prepared_stack(f"layers.{name}", leaf) for name, leaf in layers.items()}}


def _rows_by_name(layers: Sequence[LayerWeights]) -> dict[str, list[Leaf]]:
    """For each weight, those of the layers that have it."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {name: [layer[name] for layer in layers if name in layer] for name in names}


def _needs_separate_head(config: ResolvedConfig) -> bool:
    """Whether a tied head needs its own memory, because a prepared matrix is not a plain array.

    The embedding stays an array, because its rows are looked up.
    """
    return config.packed_weights or config.quantize is not None
