"""Tensor parallelism: heads, states, MLP columns and vocabulary are divided over one axis of a device mesh.

The forward pass is the same as on one device: weights and cache carry shardings, and XLA inserts the sums, two per layer.
Two things are explicit: the order of fused columns (see `columns`) and, because kernels are opaque to XLA, the division of
attention and experts. Each device computes attention for its own heads with its own part of the cache, and computes its own
hidden units of every expert.

With `Execution.sums_in_order` the sums are explicit too, because XLA adds up each element in an order that depends on its
place; see `pallas_kernels.ordered_sum`. One kind remains: all devices look up a token in a divided embedding, and all but
one of them find zeros, whose sum is exact in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache
from fastgen_jax.models.adapters import AdaptedWeight
from fastgen_jax.models.columns import deal_columns
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import DIVIDED_AXES, divided_array, divided_parts
from fastgen_jax.models.params import param_specs
from fastgen_jax.models.weight_spec import Kind, LayerWeights, Leaf, Params, WeightSpec
from pallas_kernels.matmul import DividedArray, Division, Int4Weight, ScaledWeight, inputs_last, reads_in_place
from pallas_kernels.ordered_sum import ordered_sum, ordered_sum_of_few
from pallas_kernels.ragged_attention import Attention, CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.quantized import Cache

T = TypeVar("T")

TENSOR = "tensor"
"""Name of the mesh axis."""


def tensor_mesh(devices: Sequence[object]) -> Mesh:
    """A mesh with the one axis `TENSOR`."""
    return Mesh(np.array(devices), (TENSOR,), axis_types=(AxisType.Auto,))


def partition_params(config: ModelConfig, params: Params) -> Params:
    """A PartitionSpec for each leaf of stacked `params`, arrays or shapes, from the declared logical axes."""
    return jax.tree.map(partition_leaf, param_specs(config), params)


def partition_leaf(spec: WeightSpec, leaf: Leaf) -> Leaf:
    """The PartitionSpec of a weight, array or shape, of one layer or stacked; one with scales gets one for each part."""
    axes = tuple(TENSOR if axis in DIVIDED_AXES else None for axis in spec.axes)

    def partition(axes: tuple[str | None, ...], ndim: int) -> PartitionSpec:
        return PartitionSpec(*(None,) * (ndim - len(axes)), *axes)  # a stack over layers has one more leading axis

    if isinstance(leaf, ScaledWeight):
        in_blocks = leaf.scales.ndim == leaf.values.ndim  # of inputs, and divided like them
        of_scales = partition(axes if in_blocks else (*axes[:-2], axes[-1]), leaf.scales.ndim)
        if inputs_last(leaf):
            axes = (*axes[:-2], axes[-1], axes[-2])
        parts = {"values": partition(axes, leaf.values.ndim)} | ({} if leaf.layer is None else {"layer": PartitionSpec()})
        return dataclasses.replace(jax.tree.map(lambda _: of_scales, leaf), **parts)
    return partition(axes, leaf.ndim)


def in_place(spec: WeightSpec, leaf: Leaf, dtype: DTypeLike, mesh: Mesh | None) -> ScaledWeight | None:
    """`leaf` in the form in which `linear` reads it where it is, for activations of `dtype`; None if it does not."""
    division = None
    if mesh is not None and mesh.size > 1 and spec.kind is Kind.MATRIX:
        axis = None if DIVIDED_AXES.isdisjoint(spec.axes) else TENSOR
        division = Division(mesh=mesh, axis=axis, of_inputs=spec.axes[-1] not in DIVIDED_AXES)
    return dataclasses.replace(leaf, division=division) if reads_in_place(leaf, dtype, division) else None


def in_order(weights: LayerWeights, mesh: Mesh, config: ModelConfig) -> LayerWeights:
    """The weights of a layer, of which those that each device has a share of the inputs of are added up in order.

    Not shared experts: see `divide_experts`.
    """
    division = Division(mesh=mesh, axis=TENSOR, of_inputs=True, in_order=True)
    specs = param_specs(config)["layers"]

    def added(spec: WeightSpec, leaf: Leaf) -> Leaf:
        if spec.kind is not Kind.MATRIX or spec.axes[-2] not in DIVIDED_AXES or spec.name.startswith("shared_"):
            return leaf
        if isinstance(leaf, AdaptedWeight):
            return dataclasses.replace(leaf, weight=added(spec, leaf.weight), division=division)
        if isinstance(leaf, ScaledWeight):
            return dataclasses.replace(leaf, division=division)
        return DividedArray(values=leaf, division=division)

    return {name: added(specs[name], leaf) for name, leaf in weights.items()}


def sum_in_order(x: jax.Array, mesh: Mesh) -> jax.Array:
    """In float32: the sum over all axes but the first of `x`, the second of which is divided over `mesh`; [T, 1, ...]."""

    def local(x: jax.Array) -> jax.Array:
        return ordered_sum_of_few(jnp.sum(x.astype(jnp.float32), axis=range(1, x.ndim), keepdims=True), TENSOR)

    columns, whole = PartitionSpec(None, TENSOR), PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=columns, out_specs=whole, check_vma=False)(x)


def divide_leaf(spec: WeightSpec, leaf: Leaf, mesh: Mesh, config: ModelConfig) -> Leaf:
    """A weight of a checkpoint, plain or with scales, sharded over `mesh`.

    It has the sizes of the divided model (see `division`) and its columns are reordered (see `columns`). Weights with scales
    of blocks of inputs must be as `division.keeps_blocks` wants them.
    """
    if not isinstance(leaf, ScaledWeight):
        return place_leaf(spec, divide_array(spec, leaf, mesh, config), mesh)
    every_axis = range(-len(spec.axes), 0)
    of_columns = [axis for axis in every_axis if axis != -2]

    def columns(array: jax.Array | np.ndarray, fill: int) -> np.ndarray:
        """With another axis in the place of the inputs."""
        array = divide_array(spec, np.moveaxis(np.asarray(array), -2, 0), mesh, config, axes=of_columns, fill=fill)
        return np.moveaxis(array, 0, -2)

    in_blocks = leaf.scales.ndim == leaf.values.ndim
    scales = columns(leaf.scales, 1) if in_blocks else divide_array(spec, leaf.scales, mesh, config, axes=of_columns, fill=1)
    if isinstance(leaf, Int4Weight):
        offsets = None if leaf.offsets is None else columns(leaf.offsets, 0)
        leaf = dataclasses.replace(leaf, values=columns(leaf.values, 0), scales=scales, offsets=offsets)
    elif inputs_last(leaf):
        values = divide_array(spec, np.asarray(leaf.values).swapaxes(-1, -2), mesh, config).swapaxes(-1, -2)
        leaf = dataclasses.replace(leaf, values=values, scales=scales)
    else:
        leaf = dataclasses.replace(leaf, values=divide_array(spec, leaf.values, mesh, config), scales=scales)
    return place_leaf(spec, leaf, mesh)


def divide_array(
    spec: WeightSpec,
    array: jax.Array | np.ndarray,
    mesh: Mesh,
    config: ModelConfig,
    *,
    axes: Sequence[int] | None = None,
    fill: int = 0,
) -> np.ndarray:
    """`array` with the sizes and the order of columns that `mesh` divides, on the host.

    `axes` and `fill` as for `divided_array` (default: all axes of the weight).
    """
    axes = range(-len(spec.axes), 0) if axes is None else axes
    platform = mesh.devices.flat[0].platform
    parts = divided_parts(spec, config, mesh.size, platform)
    array = divided_array(spec, np.asarray(array), config, mesh.size, axes=axes, fill=fill, platform=platform)
    return deal_columns(array, parts, mesh.size) if len(parts) > 1 else array


def place_leaf(spec: WeightSpec, leaf: Leaf, mesh: Mesh) -> Leaf:
    """A weight of the divided model, with its parts on their devices."""
    return jax.tree.map(jax.device_put, leaf, shardings(mesh, partition_leaf(spec, leaf)))


def partition_kv_cache(cache: KVCache) -> KVCache:
    """The PartitionSpecs of `cache`, arrays or shapes: each device holds the blocks and states of its own heads."""
    parts = jax.tree.map(lambda _: PartitionSpec(None, TENSOR), dataclasses.replace(cache, states={}))
    return dataclasses.replace(parts, states=partition_states(cache.states))


def partition_states(names: Iterable[str]) -> dict[str, PartitionSpec]:
    """The PartitionSpecs of the pools of states (see `models.states`) that have these names."""
    # Heads or channels; the inputs of tokens are those of all heads side by side.
    return {name: PartitionSpec(None, None, TENSOR) if name == "recent" else PartitionSpec(None, TENSOR) for name in names}


def shardings(mesh: Mesh, specs: T) -> T:
    """`specs` as NamedShardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def divide_heads(attend: Attention, mesh: Mesh) -> Attention:
    """`attend`, run by each device of `mesh` on its own heads."""

    def divided(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_cache: Cache,
        v_cache: Cache | None,
        index: RaggedIndex,
        layer: CacheLayer,
        scoring: Scoring,
    ) -> tuple[jax.Array, Cache, Cache | None]:
        layer = dataclasses.replace(layer, number=jnp.asarray(layer.number, jnp.int32))
        scoring = jax.tree.map(jnp.asarray, scoring)
        heads, whole = PartitionSpec(None, TENSOR), PartitionSpec()
        scoring_specs = jax.tree.map(lambda x: PartitionSpec(TENSOR) if x.ndim == 1 else whole, scoring)  # [H]
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(heads, heads, heads, heads, heads, whole, whole, scoring_specs),
            out_specs=heads,
            check_vma=False,
        )(q, k, v, k_cache, v_cache, index, layer, scoring)

    return divided


def divide_columns(compute: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """`compute(x, *others)`, run by each device of `mesh` on its own columns of x [T, columns].

    The others are replicated. The second axis of the results is divided as well.
    """

    def divided(x: jax.Array, *others: jax.Array) -> T:
        columns, whole = PartitionSpec(None, TENSOR), PartitionSpec()
        in_specs = (columns, *(whole for _ in others))
        return jax.shard_map(compute, mesh=mesh, in_specs=in_specs, out_specs=columns, check_vma=False)(x, *others)

    return divided


def divide_state(compute: Callable[..., Any], mesh: Mesh, specs: Mapping[str, WeightSpec]) -> Callable[..., Any]:
    """`compute(y, gates, weights, states, *others)`, run by each device of `mesh` on its own heads of a layer with a state.

    `y` and `gates` are projections whose columns are divided, `specs` the declarations of the weights. The result is divided
    by columns too, and returned with the states.
    """

    def divided(
        y: jax.Array,
        gates: jax.Array | None,
        weights: dict[str, jax.Array],
        states: dict[str, jax.Array],
        rows: dict[str, jax.Array],
        row: jax.Array | int,
        num_tokens: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        columns, whole, kept = PartitionSpec(None, TENSOR), PartitionSpec(), partition_states(states)
        of_weights = {name: partition_leaf(specs[name], leaf) for name, leaf in weights.items()}
        return jax.shard_map(
            compute,
            mesh=mesh,
            in_specs=(columns, columns, of_weights, kept, whole, whole, whole),
            out_specs=(columns, kept),
            check_vma=False,
        )(y, gates, weights, states, rows, jnp.asarray(row, jnp.int32), num_tokens)

    return divided


def divide_experts(
    compute: Callable[..., jax.Array], mesh: Mesh, specs: Mapping[str, WeightSpec], *, in_order: bool = False
) -> Callable[..., jax.Array]:
    """`compute(weights, *others)`, run by each device of `mesh` on its own hidden units and summed over devices, `in_order`
    or not.

    `specs` are the declarations of the weights, a dict; the other arguments and the result are replicated.
    """
    # A bias after a divided sum is replicated, and must be added once.
    added_once = [name for name, spec in specs.items() if spec.kind is Kind.BIAS and DIVIDED_AXES.isdisjoint(spec.axes)]

    def divided(weights: LayerWeights, *others: jax.Array) -> jax.Array:
        def local(weights: dict[str, Leaf], others: tuple[jax.Array, ...]) -> jax.Array:
            is_first = jax.lax.axis_index(TENSOR) == 0
            weights = weights | {name: jnp.where(is_first, weights[name], 0) for name in added_once}
            y = compute(weights, *others)
            return ordered_sum(y, TENSOR, mesh.size) if in_order else jax.lax.psum(y, TENSOR)

        in_specs = ({name: partition_leaf(specs[name], leaf) for name, leaf in weights.items()}, PartitionSpec())
        run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)
        return run(dict(weights), others)

    return divided
