"""The decoder: one pure function from a batch of chunks to the requested logits.

What differs between families is in `ModelConfig`. The norms of a layer are in one of four places:

    "input"                 "output" (OLMo 2)       "both" (Gemma 2)            "residual" (OPT-350m)
    x += attn(norm(x))      x += norm(attn(x))      x += norm(attn(norm(x)))    x = norm(x + attn(x))
    x += mlp(norm(x))       x += norm(mlp(x))       x += norm(mlp(norm(x)))     x = norm(x + mlp(x))

and with `parallel_residual`: x += attn(norm(x)) + mlp(norm'(x)), where norm' may be the same norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache, RaggedBatch, StepImages
from fastgen_jax.models.adapters import AdaptedWeight, bound, rows_of, sampled_rows, with_adapters
from fastgen_jax.models.attention import LayerCall, Step, attention, prepare_step, take_rows
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import divided
from fastgen_jax.models.layers import norm, soft_cap
from fastgen_jax.models.mixer import mix
from fastgen_jax.models.mlp import mlp
from fastgen_jax.models.params import layers_with, param_specs, plain_name
from fastgen_jax.models.segments import Place, Segment, run_loops
from fastgen_jax.models.sharding import in_place
from fastgen_jax.models.sparse import with_choice
from fastgen_jax.models.streams import (
    in_streams,
    inputs_of_layers,
    join_streams,
    low_rank,
    scaled,
    split_streams,
    with_inputs,
)
from fastgen_jax.models.weight_spec import Kind, LayerWeights, Leaf, Params, WeightSpec
from pallas_kernels import gpu_target
from pallas_kernels.grouped_matmul import PackedGroups
from pallas_kernels.matmul import Float8Weight, Int8Weight, PackedWeight, linear
from pallas_kernels.ragged_attention import Attention

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Layer = Callable[[jax.Array, KVCache, LayerWeights, LayerCall], tuple[jax.Array, KVCache]]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a forward pass runs. Apart from rounding, the results do not depend on it."""

    attention: str | Attention | None = None
    """Name of an implementation of `ragged_attention`, or a replacement for it; None: the best one for the platform."""
    activation_dtype: DTypeLike | None = None
    """Dtype of the residual stream; None: that of the embedding."""
    mesh: Mesh | None = None
    """Devices that weights and cache are sharded over, by `models.sharding`; None: a single device."""
    independent_pieces: bool = False
    """Divides the attention of each sequence by its own length alone; see `ragged_attention.plan_layers`."""
    wrap_layer: Callable[[Layer], Layer] | None = None
    """Makes another function of that of a layer, for example one that is computed again for a derivative."""


def forward(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    execution: Execution = Execution(),
    images: StepImages | None = None,
) -> tuple[Float[Array, "R V"], KVCache]:
    """Logits in float32 of `batch.sample_rows`, and the cache with the K and V of the batch's tokens added.

    Unused rows of logits are finite and meaningless. Differentiable with respect to plain `params`; see
    `docs/research.md`.
    """
    rows, kv_cache = hidden_rows(params, kv_cache, batch, config=config, execution=execution, images=images)
    return head(rows, params, batch.num_sample_rows, config=config)[:, : config.vocab_size], kv_cache


def hidden_rows(
    params: Params,
    kv_cache: KVCache,
    batch: RaggedBatch,
    *,
    config: ModelConfig,
    execution: Execution = Execution(),
    adapters: Mapping[str, AdaptedWeight] | None = None,
    images: StepImages | None = None,
) -> tuple[Float[Array, "R E"], KVCache]:
    """The input of `head`: the residual stream of `batch.sample_rows` after the final norm, and the cache.

    With a mesh, weights and cache are those of the divided model (see `division`). `adapters` are those that
    `batch.adapters` numbers.
    """
    step = prepare_step(
        batch,
        kv_cache,
        config=config,
        implementation=execution.attention,
        mesh=execution.mesh,
        spans=None if images is None else images.spans,
        independent_pieces=execution.independent_pieces,
    )
    if execution.mesh is not None:
        config = divided(config, execution.mesh.size)
    run = _parallel_layer if config.parallel_residual else _sequential_layer
    layer = partial(run, step=step, config=config)
    if config.full_heads is not None or config.reader_mlp_dim is not None:
        layer = _with_own_sizes(run, step, config)
    if execution.wrap_layer is not None:
        layer = execution.wrap_layer(layer)
    if adapters is not None:
        params = with_adapters(params, adapters, config)
        layer = _for_adapters(layer, batch, adapters)
    x = _embed(params, batch, config, execution.activation_dtype)
    if images is not None:
        x = jnp.where(images.is_image[:, None], images.embeddings[0].astype(x.dtype), x)
        layer = _adding(layer, images.embeddings[1:].astype(x.dtype))
    if config.layer_inputs is not None:
        inputs = inputs_of_layers(params, batch.token_ids, x, config=config, num_tokens=step.num_tokens)
        layer = (with_inputs if config.altup is None else in_streams)(layer, inputs, step=step, config=config)
    if config.layer_scale:
        layer = scaled(layer)
    if config.altup is not None:
        x = split_streams(x, params, config.altup, step.num_tokens)
    if step.sparse is not None:
        kv_cache = with_choice(kv_cache, config, batch.token_ids.shape[0])
    rows, kv_cache = run_layers(
        layer, params["layers"], x, kv_cache, rows=batch.sample_rows, config=config, mesh=execution.mesh
    )
    if step.sparse is not None:
        kv_cache = replace(kv_cache, chosen=None)
    if config.altup is not None:
        rows = join_streams(rows, params, config.altup, batch.num_sample_rows)
    if config.final_norm:
        rows = norm(rows, params, "final_norm", config=config, num_rows=batch.num_sample_rows)
    if config.embed_proj_dim is not None:
        rows = linear(rows, params["project_out"])
    return rows, kv_cache


def _with_own_sizes(run: Callable[..., tuple[jax.Array, KVCache]], step: Step, config: ModelConfig) -> Layer:
    """`run` for each layer with its own sizes; weights have the names that they have in other models."""

    def sized(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        own = {plain_name(name): leaf for name, leaf in w.items()}
        return run(x, cache, own, call, step=step, config=config.of_layer(call.first))

    return sized


def _for_adapters(layer: Layer, batch: RaggedBatch, adapters: Mapping[str, AdaptedWeight]) -> Layer:
    """`layer` with the adapters of the batch's rows."""
    ids = batch.adapters
    assert ids is not None, "a batch for adapters numbers them"
    count = next(iter(adapters.values())).count
    tokens = rows_of(ids, count)
    sampled = sampled_rows(ids, batch.sample_rows, batch.num_sample_rows, count)

    def adapted(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        return layer(x, cache, bound(w, tokens, tokens if call.rows is None else sampled), call)

    return adapted


def _adding(layer: Layer, parts: Float[Array, "parts T E"]) -> Layer:
    """`layer` with `parts[i]` added to the result of layer i."""
    count = len(parts)
    if not count:
        return layer

    def adding(x: jax.Array, cache: KVCache, w: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
        x, cache = layer(x, cache, w, call)
        if isinstance(call.index, int):
            return (x + take_rows(parts[call.index], call.rows) if call.index < count else x), cache
        part = jax.lax.dynamic_index_in_dim(parts, jnp.minimum(call.index, count - 1), keepdims=False)
        return jnp.where(call.index < count, x + take_rows(part, call.rows), x), cache

    return adding


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

    in_place: Mapping[str, Int8Weight | Float8Weight]
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


def _embed(params: Params, batch: RaggedBatch, config: ModelConfig, dtype: DTypeLike | None) -> jax.Array:
    x = jnp.take(params["embed"], batch.token_ids, axis=0)  # [T, E]
    if dtype is not None:
        x = x.astype(dtype)
    if config.embed_multiplier != 1.0:
        x = x * config.embed_multiplier
    if config.embed_proj_dim is not None:
        x = linear(x, params["project_in"])
    if config.learned_positions:
        places = jnp.take(params["position_embed"], batch.positions + config.position_offset, axis=0, mode="clip")
        x = x + places.astype(x.dtype)
    if config.embed_norm:
        x = norm(x, params, "embed_norm", config=config, num_rows=batch.index.query_starts[-1])
    return x


def _sequential_layer(
    x: jax.Array,
    cache: KVCache,
    w: LayerWeights,
    call: LayerCall,
    *,
    step: Step,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    place, scale = config.norm_placement, config.residual_multiplier
    before, after = place in ("input", "both"), place in ("output", "both")
    # Adding x within the last product is cheaper, if nothing comes between them.
    fused = not after and scale == 1.0

    h = norm(x, w, "attn_norm", config=config, num_rows=step.num_tokens) if before and call.mixes else x
    x, used = take_rows(x, call.rows), step.num_rows(call.rows)
    if call.mixes:
        y, cache = mix(h, w, cache, step, call, config=config, residual=x if fused else None)
        if not fused:
            y = x + scale * (norm(y, w, "post_attn_norm", config=config, num_rows=used) if after else y)
        if config.laurel_rank:
            y = (y + low_rank(take_rows(h, call.rows), w, config=config, num_rows=used)) * 0.5**0.5
        x = norm(y, w, "attn_norm", config=config, num_rows=used) if place == "residual" else y
    if not call.has_mlp:
        return x, cache

    h = norm(x, w, "mlp_norm", config=config, num_rows=used) if before else x
    residual = x if fused else None
    y = mlp(h, w, call, config=config, num_tokens=used, residual=residual, mesh=step.mesh)
    if not fused:
        y = x + scale * (norm(y, w, "post_mlp_norm", config=config, num_rows=used) if after else y)
    return norm(y, w, "mlp_norm", config=config, num_rows=used) if place == "residual" else y, cache


def _parallel_layer(
    x: jax.Array,
    cache: KVCache,
    w: LayerWeights,
    call: LayerCall,
    *,
    step: Step,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    h = norm(x, w, "attn_norm", config=config, num_rows=step.num_tokens)
    x, used = take_rows(x, call.rows), step.num_rows(call.rows)
    for_mlp = take_rows(h, call.rows) if config.shared_norm else norm(x, w, "mlp_norm", config=config, num_rows=used)
    y, cache = attention(h, w, cache, step, call, config=config, residual=x)
    y = mlp(for_mlp, w, call, config=config, num_tokens=used, residual=y, mesh=step.mesh)
    return y, cache


def head(rows: Float[Array, "R E"], params: Params, num_rows: Int[Array, ""], *, config: ModelConfig) -> Float[Array, "R V"]:
    """Logits in float32 of `rows`, of which the first `num_rows` are used.

    Columns from V on, which the head of a divided model may have, are padding.
    """
    weight = params["lm_head"] if "lm_head" in params else params["embed"].T
    logits = linear(rows, weight, num_rows=num_rows).astype(jnp.float32)
    if config.head_bias:
        logits = logits + params["lm_head_bias"].astype(jnp.float32)[None, :]
    if config.logits_multiplier != 1.0:
        logits = logits * config.logits_multiplier
    return soft_cap(logits, config.logits_soft_cap)
