"""The adapters of an engine on its devices: stacks over layers and adapters, with a place for each adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.models.adapters import AdaptedWeight
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import DIVIDED_AXES, divided
from fastgen_jax.models.params import layers_with
from fastgen_jax.models.sharding import TENSOR, divide_leaf, tensor_mesh
from fastgen_jax.models.targets import STATE, Lora, adaptable
from fastgen_jax.models.weight_spec import WeightSpec, matrix
from pallas_kernels.grouped_matmul import GroupedWeight, PackedGroups
from pallas_kernels.grouped_matmul import prepare as prepare_groups

Stacks = Mapping[str, AdaptedWeight]

# The axis of adapters in a stack.
_DOWN_AXIS = 3
_UP_AXIS = 1


def empty_stacks(model: ModelConfig, config: ResolvedConfig) -> Stacks | None:
    """Zeros in all places: adapters that change nothing; None if the engine has no place for adapters."""
    count = config.num_adapters
    if count == 0:
        return None
    nothing = adapter_arrays({"layers": {}}, model, config, scale=1.0)

    def zeros(array: jax.Array, axis: int) -> jax.Array:
        shape = (*array.shape[:axis], count, *array.shape[axis:])
        if not isinstance(array.sharding, NamedSharding):
            # Bound to its device as the results of `write` are, so that this is compiled once.
            return jax.device_put(jnp.zeros(shape, array.dtype), array.sharding)
        place = NamedSharding(array.sharding.mesh, _with_axis(array.sharding.spec, axis, array.ndim))
        return jnp.zeros(shape, array.dtype, device=place)

    return {name: _each(zeros, weight) for name, weight in nothing.items()}


def stack_shapes(model: ModelConfig, config: ResolvedConfig, mesh: Mesh | None) -> Stacks | None:
    """The shapes of `empty_stacks` on an accelerator that need not be here, with their places on `mesh` if there is one."""
    if config.num_adapters == 0:
        return None
    if mesh is not None:
        model = divided(model, mesh.size, mesh.devices.flat[0].platform)
    count, rank, dtype, having = config.num_adapters, config.max_adapter_rank, jnp.dtype(config.dtype), layers_with(model)

    def shape(sizes: tuple[int, ...], partition: PartitionSpec, axis: int) -> Any:
        place = None if mesh is None else NamedSharding(mesh, _with_axis(partition, axis, len(sizes)))
        return jax.ShapeDtypeStruct((*sizes[:axis], count, *sizes[axis:]), dtype, sharding=place)

    stacks = {}
    for name, spec in adaptable(model, divided=mesh is not None).items():
        layers, inputs, widths = len(having[name]), spec.shape[0], _widths(spec)
        down = PartitionSpec(None, TENSOR if spec.axes[0] in DIVIDED_AXES else None, None, None)
        ups = (
            PartitionSpec(None, None, TENSOR if letter in DIVIDED_AXES else None) for letter in _letters(spec, len(widths))
        )
        stacks[name] = AdaptedWeight(
            down=shape((layers, inputs, len(widths), rank), down, _DOWN_AXIS),
            up=tuple(shape((layers, rank, width), up, _UP_AXIS) for width, up in zip(widths, ups, strict=True)),
            num_devices=1 if mesh is None else mesh.size,
        )
    return stacks


def _with_axis(partition: PartitionSpec, axis: int, ndim: int) -> PartitionSpec:
    """`partition` of an array of `ndim` axes, before one of which another is inserted."""
    axes = [*partition, *[None] * (ndim - len(partition))]
    return PartitionSpec(*axes[:axis], None, *axes[axis:])


def _letters(spec: WeightSpec, num_parts: int) -> tuple[str, ...]:
    """The axis of the columns of each part of a fused matrix; keys and values have the heads of the cache."""
    return ("HD", "KD", "KD") if num_parts == 3 else (spec.axes[1],) * num_parts


def adapter_arrays(lora: Lora, model: ModelConfig, config: ResolvedConfig, *, scale: float) -> Stacks:
    """One adapter in the form of the stacks, without their axis of adapters; `scale` times its products are the change.

    Raises:
        ValueError: it changes what adapters cannot change, or has another shape or a higher rank than the engine allows.
    """
    specs = adaptable(model, divided=config.tensor_parallel is not None)
    check_lora(lora, model, specs, max_rank=config.max_adapter_rank)
    rank, having = config.max_adapter_rank, layers_with(model)
    arrays = {}
    for name, spec in specs.items():
        count, inputs, widths = len(having[name]), spec.shape[0], _widths(spec)
        down = np.zeros((count, inputs, len(widths), rank), np.float32)
        up = [np.zeros((count, rank, width), np.float32) for width in widths]
        for i, part in enumerate(lora["layers"].get(name, ())):
            own = part["a"].shape[-1]
            down[:, :, i, :own] = np.asarray(part["a"], np.float32)
            up[i][:, :own] = scale * np.asarray(part["b"], np.float32)
        arrays[name] = _placed(down, up, spec, model, config)
    return arrays


def _placed(
    down: np.ndarray, up: list[np.ndarray], spec: WeightSpec, model: ModelConfig, config: ResolvedConfig
) -> AdaptedWeight:
    """An adapter of one matrix on the devices, from down [L, in, parts, r] and up [L, r, width] of each part."""
    dtype = jnp.dtype(config.dtype)
    if config.packed_weights:
        pack = partial(prepare_groups, platform="cpu")
        flat = down.reshape(*down.shape[:2], -1)
        return AdaptedWeight(down=pack(flat.astype(dtype)), up=tuple(pack(part.astype(dtype)) for part in up))
    if config.tensor_parallel is None:
        return AdaptedWeight(down=jnp.asarray(down, dtype), up=tuple(jnp.asarray(part, dtype) for part in up))
    mesh, rank = tensor_mesh(jax.local_devices()[: config.tensor_parallel]), down.shape[-1]
    flat = down.reshape(*down.shape[:2], -1).astype(dtype)
    rows = divide_leaf(matrix("down", flat.shape[1:], (spec.axes[0], "rank")), flat, mesh, model)
    place = NamedSharding(mesh, PartitionSpec(*rows.sharding.spec, None))
    return AdaptedWeight(
        down=jax.device_put(rows.reshape(*rows.shape[:2], len(up), rank), place),
        up=tuple(
            divide_leaf(matrix("up", part.shape[1:], ("rank", letter)), part.astype(dtype), mesh, model)
            for part, letter in zip(up, _letters(spec, len(up)), strict=True)
        ),
        num_devices=mesh.size,
    )


def write(stacks: Stacks, adapter: Stacks, place: int) -> Stacks:
    """New stacks with the arrays of an adapter in one place; steps in flight keep the old ones."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None, stacks)
    return jax.jit(_written, out_shardings=shardings)(stacks, adapter, np.int32(place))


def _written(stacks: Stacks, adapter: Stacks, place: jax.Array) -> Stacks:
    return {
        name: _each(lambda stack, axis, new: jax.lax.dynamic_update_index_in_dim(stack, new, place, axis), w, adapter[name])
        for name, w in stacks.items()
    }


def _each(change: Any, weight: AdaptedWeight, *others: AdaptedWeight) -> AdaptedWeight:
    """`weight` with `change(array, axis of adapters, arrays of others)` in place of each array."""

    def changed(matrix: GroupedWeight, axis: int, *more: Any) -> Any:
        if isinstance(matrix, PackedGroups):
            scales = jnp.zeros((matrix.panels.shape[0], 0), jnp.float32)  # there are none
            return replace(matrix, panels=change(matrix.panels, 1, *(other.panels for other in more)), scales=scales)
        return change(matrix, axis, *more)

    parts = zip(weight.up, *(other.up for other in others), strict=True)
    return replace(
        weight,
        down=changed(weight.down, _DOWN_AXIS, *(other.down for other in others)),
        up=tuple(changed(part, _UP_AXIS, *more) for part, *more in parts),
    )


def check_lora(lora: Lora, model: ModelConfig, specs: Mapping[str, WeightSpec], *, max_rank: int) -> None:
    """ValueError unless `lora` are adapters of `specs` with at most this rank, in the form of `lora_params`."""
    layers = lora.get("layers") if isinstance(lora, Mapping) else None
    if not isinstance(layers, Mapping) or len(lora) != 1:
        raise ValueError("an adapter is a dict {'layers': {name: pairs}}, as lora_params returns it, or a folder of PEFT")
    having = layers_with(model)
    for name, parts in layers.items():
        if name not in specs and name in STATE:
            raise ValueError(
                f"the adapter changes {name!r}, which is not supported with tensor_parallel; start without it, or merge the "
                "adapter into the model"
            )
        if name not in specs:
            raise ValueError(
                f"the adapter changes {name!r}, which is not a matrix that requests can have an adapter of; choose from "
                f"{', '.join(specs)}"
            )
        spec, count = specs[name], len(having[name])
        widths = _widths(spec)
        if len(parts) != len(widths):
            raise ValueError(
                f"the adapter has {len(parts)} pairs for {name!r}, but must have one for each of {len(widths)} projections"
            )
        for part, width in zip(parts, widths, strict=True):
            a, b = part["a"], part["b"]
            rank = a.shape[-1]
            if tuple(a.shape) != (count, spec.shape[0], rank) or tuple(b.shape) != (count, rank, width):
                raise ValueError(
                    f"a pair of the adapter for {name!r} has the shapes {list(a.shape)} and {list(b.shape)}, but must have "
                    f"[{count}, {spec.shape[0]}, rank] and [{count}, rank, {width}]"
                )
            if rank > max_rank:
                raise ValueError(
                    f"the adapter has rank {rank}, but max_adapter_rank is {max_rank}; start with max_adapter_rank={rank}"
                )


def _widths(spec: WeightSpec) -> tuple[int, ...]:
    """The widths of the projections in a matrix."""
    return spec.parts or (spec.shape[-1],)
