"""Calls each layer with its weights: in loops over stacks, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import layers_with, param_specs
from fastgen_jax.models.segments import Place, Segment, run_loops
from fastgen_jax.models.sharding import in_place
from fastgen_jax.models.step import LayerCall
from fastgen_jax.models.weight_spec import Kind, LayerWeights, Leaf, WeightSpec
from pallas_kernels import gpu_target
from pallas_kernels.grouped_matmul import PackedGroups
from pallas_kernels.matmul import PackedWeight, ScaledWeight

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Layer = Callable[[jax.Array, KVCache, LayerWeights, LayerCall], tuple[jax.Array, KVCache]]
"""`layer(x, cache, weights, call)` returns the new x and cache."""


def run_layers(
    layer: Layer,
    layers: LayerWeights | Sequence[LayerWeights],
    x: Float[Array, "T ..."],
    kv_cache: KVCache,
    *,
    rows: Int[Array, " R"],
    config: ModelConfig,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "R ..."], KVCache]:
    """x[rows] after applying `layer(x, cache, weights, call)` once per layer; the form of `layers` selects scan or unroll.

    One dict of stacked arrays is scanned, so the program does not grow with depth. If layers have different weights
    (an MLP in some, experts or a state in others), similar ones share the body of a loop. A tuple of L dicts is unrolled: on
    a CPU, the slices of a scan are copies, so every step would read and write the whole model once more. Only packed stacks
    are scanned there, whose kernels read a layer in place. With packed stacks and tuples the last layer is called for `rows`
    only, because no other row is read after its attention.
    """
    if isinstance(layers, Mapping) and any(map(_is_packed, jax.tree.leaves(layers, is_leaf=_is_packed))):
        return _run_packed(layer, layers, x, kv_cache, rows=rows, config=config)
    if not isinstance(layers, Mapping):
        for index, weights in enumerate(layers):
            call = _call(config, Place(first=index), rows=rows if index == len(layers) - 1 else None)
            x, kv_cache = layer(x, kv_cache, weights, call)
        return x, kv_cache

    specs = param_specs(config)["layers"]
    # Experts are passed as one stack: a slice would be a copy, because a grouped matmul is opaque to XLA.
    experts = {
        name: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), layers[name])
        for name, spec in specs.items()
        if spec.kind is Kind.EXPERTS
    }
    having = layers_with(config)
    held = _held_stacks(layers, specs, having, x.dtype, mesh)
    if not experts and all(len(rows) == config.num_layers for rows in having.values()):
        whole = Segment(0, 1, config.num_layers)

        def body(
            carry: tuple[jax.Array, KVCache, jax.Array], weights: LayerWeights
        ) -> tuple[tuple[jax.Array, KVCache, jax.Array], None]:
            x, cache, index = carry
            place = Place(first=0, loops=((whole, index),))
            x, cache = layer(x, cache, {**weights, **held.at(place)}, _call(config, place))
            return (x, cache, index + 1), None

        # The counter is carried as in `run_loops`.
        sliced = {name: leaf for name, leaf in layers.items() if name not in held.names}
        (x, kv_cache, _), _ = jax.lax.scan(body, (x, kv_cache, jnp.int32(0)), sliced, length=config.num_layers)
        return jnp.take(x, rows, axis=0), kv_cache

    def one(carry: tuple[jax.Array, KVCache], place: Place) -> tuple[jax.Array, KVCache]:
        # The same as slicing the xs of a scan, but the stacks also hold the layers of other loops.
        weights = {
            name: jax.tree.map(partial(jax.lax.dynamic_index_in_dim, index=row, keepdims=False), layers[name])
            for name, rows in having.items()
            if name not in experts and name not in held.names and (row := place.row(rows)) is not None
        }
        weights |= held.at(place)
        call = _call(config, place, experts_of_all=True)
        return layer(*carry, weights if call.first_expert is None else weights | experts, call)

    x, kv_cache = run_loops(_kinds(having, config.num_layers), one, (x, kv_cache))
    return jnp.take(x, rows, axis=0), kv_cache


def _call(config: ModelConfig, place: Place, *, rows: jax.Array | None = None, experts_of_all: bool = False) -> LayerCall:
    """The call of a layer; with `experts_of_all` it gets the experts of all layers."""
    index = place.row(range(config.num_layers))
    assert index is not None, "it is a layer of the model"
    first_expert = None if config.moe is None else place.row(config.moe.layers)
    if config.moe is not None and first_expert is not None:
        first_expert = first_expert * config.moe.num_experts if experts_of_all else 0
    return LayerCall(
        index=index,
        first=place.first,
        has_attention=place.first in config.attending_layers,
        has_keys=place.first in config.kv_layers,
        state_row=None if config.state is None else place.row(config.state.layers),
        has_mlp=config.mlp_layers is None or place.first in config.mlp_layers,
        rows=rows,
        first_expert=first_expert,
    )


@dataclass(frozen=True, kw_only=True)
class _HeldStacks:
    """Weights of all layers that a loop over layers does not slice one by one."""

    in_place: Mapping[str, ScaledWeight]
    """Weights that products read where they are."""
    vectors: Sequence[tuple[jax.Array, Mapping[str, tuple[int, int]]]]
    """Norms and biases side by side [L, all of them], and where each begins and ends."""
    having: Mapping[str, tuple[int, ...]]

    @property
    def names(self) -> set[str]:
        return {*self.in_place, *(name for _, places in self.vectors for name in places)}

    def at(self, place: Place) -> dict[str, Leaf]:
        """Those of a layer."""
        weights: dict[str, Leaf] = {
            name: leaf.at_layer(row)
            for name, leaf in self.in_place.items()
            if (row := place.row(self.having[name])) is not None
        }
        for stack, places in self.vectors:
            row = place.row(self.having[next(iter(places))])
            if row is not None:
                vector = jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)
                weights |= {name: vector[begin:end] for name, (begin, end) in places.items()}
        return weights


def _held_stacks(
    layers: LayerWeights,
    specs: Mapping[str, WeightSpec],
    having: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike,
    mesh: Mesh | None,
) -> _HeldStacks:
    # Shared experts are divided with the others, in a shard_map that gets the weights of one layer.
    beside = ("shared_", "latent_") if mesh else ()
    matrices = [name for name, spec in specs.items() if spec.kind is Kind.MATRIX and not name.startswith(beside)]
    found = {name: in_place(specs[name], layers[name], dtype, mesh) for name in matrices if name in layers}
    kept = {name: leaf for name, leaf in found.items() if leaf is not None}
    # A GPU's compiler launches a kernel for each slice. On several devices XLA would divide what lies side by side.
    if not gpu_target.is_gpu() or (mesh is not None and mesh.size > 1):
        return _HeldStacks(in_place=kept, vectors=(), having=having)
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, spec in specs.items():
        if len(spec.shape) == 1 and name in layers:
            alike.setdefault((str(layers[name].dtype), having[name]), []).append(name)
    vectors = []
    for names in alike.values():
        ends = np.cumsum([layers[name].shape[-1] for name in names]).tolist()
        places = dict(zip(names, zip([0, *ends[:-1]], ends, strict=True), strict=True))
        vectors.append((jnp.concatenate([layers[name] for name in names], axis=1), places))
    return _HeldStacks(in_place=kept, vectors=vectors, having=having)


def _run_packed(
    layer: Layer,
    layers: LayerWeights,
    x: Float[Array, "T ..."],
    kv_cache: KVCache,
    *,
    rows: Int[Array, " R"],
    config: ModelConfig,
) -> tuple[Float[Array, "R ..."], KVCache]:
    """`run_layers` for stacks of packed weights: loops, and the last layer by itself."""
    having, last = layers_with(config), config.num_layers - 1

    def one(carry: tuple[jax.Array, KVCache], place: Place, rows: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        weights = {
            name: jax.tree.map(partial(_at_row, row=row), leaf, is_leaf=_is_packed)
            for name, leaf in layers.items()
            if (row := place.row(having[name])) is not None
        }
        return layer(*carry, weights, _call(config, place, rows=rows))

    carry = run_loops(_kinds(having, last), one, (x, kv_cache))
    return one(carry, Place(first=last), rows)


def _is_packed(leaf: Leaf) -> bool:
    return isinstance(leaf, PackedWeight | PackedGroups)


def _at_row(leaf: Leaf, row: int | jax.Array) -> Leaf:
    """One row of a stack: in place if it is packed, otherwise a slice, which is a copy but small: a norm or a bias."""
    if isinstance(leaf, PackedWeight | PackedGroups):
        return leaf.at_layer(row)
    return jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False)


def _kinds(having: dict[str, tuple[int, ...]], num_layers: int) -> list[frozenset[str]]:
    """For each of the first layers, the names of its weights."""
    return [frozenset(name for name, rows in having.items() if i in rows) for i in range(num_layers)]
