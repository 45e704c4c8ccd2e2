"""The declarations of a model's weights, and random parameters created from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.moe_config import IndexerConfig, MLAConfig, MoEConfig
from fastgen_jax.models.state_specs import state_specs
from fastgen_jax.models.stream_specs import (
    input_layer_specs,
    input_model_specs,
    low_rank_specs,
    stream_layer_specs,
    stream_model_specs,
)
from fastgen_jax.models.weight_spec import (
    FULL,
    WIDE,
    DType,
    Kind,
    LayerWeights,
    Leaf,
    Params,
    WeightSpec,
    bias,
    experts,
    matrix,
    norm,
    table,
    vector,
)

if TYPE_CHECKING:
    from jaxtyping import Array, PRNGKeyArray

_ROUTES = "it decides how tokens use experts; int8 would save little memory and could change the choice"
_CHOOSES = "it decides which tokens are attended to; int8 would save little memory and could change the choice"
_ABSORBED = (
    "it is applied to queries and outputs by absorbed per-head products, so rounding it would affect every attention score, "
    "and it is a small part of the parameters (0.4 % in DeepSeek V2)"
)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """The specs of all weights, in the tree form of `Params`; the ones under "layers" are those of a single layer.

    Matrices are stored [in, out]. Projections that read the same input are fused: `qkv` holds the columns of
    all query heads, then all key heads, then all value heads unless keys are values; `gate_up` holds the gate, then the up
    projection.
    If layers differ, "layers" is the union over them; `layer_specs` returns those of one layer.
    """
    layers = [layer_specs(config, layer) for layer in range(config.num_layers)]
    return model_specs(config) | {"layers": {name: spec for specs in layers for name, spec in specs.items()}}


def all_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """The specs of all weights by their paths, like "embed" and "layers.qkv"; `param_specs` without the tree."""
    specs = param_specs(config)
    layers = specs.pop("layers")
    return {spec.path: spec for spec in (*specs.values(), *layers.values())}


def model_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """The specs of the weights outside the layers."""
    return {spec.name: spec for spec in _model_specs(config)}


def layer_specs(config: ModelConfig, layer: int) -> dict[str, WeightSpec]:
    """The specs of the weights of layer number `layer`: the norms, then attention and state, then the MLP."""
    has_state = config.state is not None and layer in config.state.layers
    has_attention = layer in config.attending_layers
    has_mlp = config.mlp_layers is None or layer in config.mlp_layers
    specs = [*_layer_norm_specs(config, mixes=has_attention or has_state, has_mlp=has_mlp)]
    own = config.of_layer(layer)
    if has_attention:
        of_attention = _attention_specs(own, has_keys=layer in config.kv_layers)
        specs += _with_prefix(FULL, of_attention) if config.is_full(layer) else of_attention
    if config.mla is not None and config.mla.indexer is not None and layer in config.mla.indexer.layers:
        specs += _indexer_specs(config.embed_dim, config.mla, config.mla.indexer)
    if config.state is not None and has_state:
        specs += state_specs(config.embed_dim, config.state)
    if config.moe is not None and layer in config.moe.layers:
        specs += [*_router_specs(config.embed_dim, config.moe), *_expert_specs(config.embed_dim, config.moe)]
        if config.moe.beside_mlp:
            specs += [spec for name in _BESIDE_MLP for spec in _norm_specs(name, config)]
    if has_mlp and (config.moe is None or layer not in config.moe.layers or config.moe.beside_mlp):
        specs += _with_prefix(WIDE, _mlp_specs(own)) if config.is_wide(layer) else _mlp_specs(own)
    specs += _stream_specs(config)
    return {spec.name: dataclasses.replace(spec, per_layer=True) for spec in specs}


# Norms of experts beside an MLP: of what the router reads, of what the experts read and return, of what the MLP returns.
_BESIDE_MLP = ("router_norm", "expert_norm", "post_expert_norm", "beside_expert_norm")


def plain_name(name: str) -> str:
    """The name that a weight of a layer has in models whose layers are all of one size."""
    return name.removeprefix(FULL).removeprefix(WIDE)


def _with_prefix(prefix: str, specs: Iterator[WeightSpec]) -> Iterator[WeightSpec]:
    for spec in specs:
        owner = spec.bias_of and prefix + spec.bias_of
        yield dataclasses.replace(spec, name=prefix + spec.name, bias_of=owner)


def expert_specs(embed_dim: int, moe: MoEConfig) -> dict[str, WeightSpec]:
    """The specs of the weights of a layer's experts, routed and shared, without the router."""
    return {spec.name: dataclasses.replace(spec, per_layer=True) for spec in _expert_specs(embed_dim, moe)}


def head_spec(config: ModelConfig) -> WeightSpec:
    """The spec of the vocabulary head, including one that is tied to the embedding and derived from it."""
    width = config.embed_proj_dim or config.embed_dim
    return matrix("lm_head", (width, config.vocab_size), ("E", "V"))


def layers_with(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """For each weight, the numbers of the layers that have it, in the order of the rows of its stacked form."""
    having: dict[str, list[int]] = {}
    for layer in range(config.num_layers):
        for name in layer_specs(config, layer):
            having.setdefault(name, []).append(layer)
    return {name: tuple(layers) for name, layers in having.items()}


def _model_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    v, e = config.vocab_size, config.embed_dim
    p = config.embed_proj_dim or e
    yield table("embed", (v + config.not_predicted, config.embed_columns or p), ("V", "E"))
    if config.embed_proj_dim is not None:
        yield matrix("project_in", (p, e), ("P", "E"))
        yield matrix("project_out", (e, p), ("E", "P"))
    if config.learned_positions:
        yield table("position_embed", (config.learned_positions, e), ("positions", "E"))
    if config.embed_norm:
        yield from _norm_specs("embed_norm", config)
    if config.final_norm:
        yield from _norm_specs("final_norm", config)
    if config.layer_inputs is not None:
        yield from input_model_specs(e, config.num_layers, config.layer_inputs, neutral=_neutral_scale(config))
    if config.altup is not None:
        yield from stream_model_specs(e, config.altup)
    head = head_spec(config)
    if not config.tie_embeddings:
        yield head
    if config.head_bias:
        yield bias(head)


def _layer_norm_specs(config: ModelConfig, *, mixes: bool, has_mlp: bool) -> Iterator[WeightSpec]:
    before, after = config.norm_placement in ("input", "both"), config.norm_placement in ("output", "both")
    if before or config.norm_placement == "residual":
        if mixes:
            yield from _norm_specs("attn_norm", config)
        if has_mlp and not config.shared_norm:
            yield from _norm_specs("mlp_norm", config)
    if after and mixes:
        yield from _norm_specs("post_attn_norm", config)
    if after and has_mlp:
        yield from _norm_specs("post_mlp_norm", config)


def _norm_specs(name: str, config: ModelConfig) -> Iterator[WeightSpec]:
    scale = norm(name, (config.embed_dim,), ("E",), initial=_neutral_scale(config))
    if config.norm_scale:
        yield scale
    if config.norm_bias:
        yield bias(scale)


def _neutral_scale(config: ModelConfig) -> float:
    return 0.0 if config.norm_offset else 1.0


def _stream_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    """The weights of a layer beside attention, state and MLP: what adds to the residual stream, or mixes several."""
    neutral = _neutral_scale(config)
    if config.layer_scale:
        yield dataclasses.replace(vector("layer_scale", 1, "one"), initial=1.0)
    if config.laurel_rank:
        yield from low_rank_specs(config.embed_dim, config.laurel_rank, neutral=neutral)
    if config.altup is not None:
        yield from stream_layer_specs(config.embed_dim, config.altup, neutral=neutral)
    if config.layer_inputs is not None:
        yield from input_layer_specs(config.embed_dim, config.layer_inputs, neutral=neutral)


def _attention_specs(config: ModelConfig, *, has_keys: bool) -> Iterator[WeightSpec]:
    if config.mla is not None:
        yield from _latent_attention_specs(config, config.mla)
        return
    e, h, k, d = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    parts = (2 * h * d if config.attention_gate else h * d, *(k * d,) * (1 if config.keys_are_values else 2))
    qkv = matrix("qkv", (e, sum(parts)), ("E", "HD"), parts=parts) if has_keys else matrix("q", (e, h * d), ("E", "HD"))
    o = matrix("o", (h * d, e), ("HD", "E"))
    yield from (qkv, o)
    if config.qkv_bias:
        yield bias(qkv)
    if config.o_bias:
        yield bias(o)
    if config.attention_sinks:
        yield vector("sinks", h, "H")
    if config.qk_norm not in (None, "unit"):
        for name, heads, letter in (("q_norm", h, "H"), ("k_norm", k, "K"))[: 1 + has_keys]:
            shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
                "head": ((d,), ("D",)),
                "per_head": ((heads, d), (letter, "D")),
                "row": ((heads * d,), (f"{letter}D",)),
            }
            shape, axes = shapes[config.qk_norm]
            scale = norm(name, shape, axes, initial=_neutral_scale(config))
            yield scale
            if config.qk_norm_bias:
                yield bias(scale)


def _latent_attention_specs(config: ModelConfig, mla: MLAConfig) -> Iterator[WeightSpec]:
    e, h = config.embed_dim, config.num_heads
    queries, latent = h * (mla.nope_dim + mla.rope_dim), mla.kv_rank + mla.rope_dim
    kv_a, o = matrix("kv_a", (e, latent), ("E", "latent")), matrix("o", (h * mla.v_dim, e), ("HD", "E"))
    yield kv_a
    yield norm("kv_a_norm", (mla.kv_rank,), ("latent",))
    yield WeightSpec(
        name="kv_b",
        kind=Kind.HEADS,
        shape=(mla.kv_rank, h * (mla.nope_dim + mla.v_dim)),
        axes=("latent", "HD"),
        never_quantized=_ABSORBED,
    )
    yield o
    if mla.kv_bias:
        yield bias(kv_a)
    if mla.q_rank is None:
        yield matrix("q", (e, queries), ("E", "HD"))
    else:
        q_a = matrix("q_a", (e, mla.q_rank), ("E", "latent"))
        yield q_a
        yield norm("q_a_norm", (mla.q_rank,), ("latent",))
        yield matrix("q_b", (mla.q_rank, queries), ("latent", "HD"))
        if mla.kv_bias:
            yield bias(q_a)
    if config.o_bias:
        yield bias(o)


def _indexer_specs(e: int, mla: MLAConfig, indexer: IndexerConfig) -> Iterator[WeightSpec]:
    assert mla.q_rank is not None, "checked by MLAConfig"
    heads, dim = indexer.num_heads, indexer.head_dim
    yield matrix("index_q", (mla.q_rank, heads * dim), ("latent", "index"))
    yield matrix("index_k", (e, dim), ("E", "index"), never_quantized=_CHOOSES)
    scale = norm("index_k_norm", (dim,), ("index",))
    yield from (scale, bias(scale))
    yield matrix("index_weights", (e, heads), ("E", "index"), never_quantized=_CHOOSES, dtype="activations")


def _mlp_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    e, f = config.embed_dim, config.mlp_dim
    if config.mlp_gated:
        up = matrix("gate_up", (e, 2 * f), ("E", "F"), parts=(f, f), gated=config.fused_swiglu)
    else:
        up = matrix("up", (e, f), ("E", "F"))
    down = matrix("down", (f, e), ("F", "E"))
    yield from (up, down)
    if config.activation == "xielu":
        yield from (vector("xielu_above", 1, "one"), vector("xielu_below", 1, "one"))
    if config.mlp_bias:
        yield from (bias(up), bias(down))


def _router_specs(e: int, moe: MoEConfig) -> Iterator[WeightSpec]:
    router = matrix("router", (e, moe.num_experts), ("E", "X"), never_quantized=_ROUTES, dtype="activations")
    yield router
    if moe.router_bias:
        yield bias(router)
    if moe.choice_bias:  # the updates of training are finer than the steps of bfloat16
        yield vector("choice_bias", moe.num_experts, "X", dtype="float32")
    if moe.expert_scale:
        yield dataclasses.replace(vector("expert_scale", moe.num_experts, "X"), initial=1.0)


def _expert_specs(e: int, moe: MoEConfig) -> Iterator[WeightSpec]:
    x, f, s = moe.num_experts, moe.expert_dim, moe.shared_dim
    width = moe.latent_dim or e
    if moe.gated:
        up = experts("expert_gate_up", (x, width, 2 * f), ("X", "E", "F"), parts=(f, f), gated=moe.fused_swiglu)
    else:
        up = experts("expert_up", (x, width, f), ("X", "E", "F"))
    down = experts("expert_down", (x, f, moe.down_dim or width), ("X", "F", "E"))
    yield from (up, down)
    if moe.expert_bias:
        yield from (bias(up), bias(down))
    if moe.latent_dim is not None:
        yield matrix("latent_in", (e, width), ("E", "latent"))
        yield matrix("latent_out", (width, e), ("latent", "E"))
    if s:
        if moe.gated:
            yield matrix("shared_gate_up", (e, 2 * s), ("E", "F"), parts=(s, s), gated=moe.activation == "silu")
        else:
            yield matrix("shared_up", (e, s), ("E", "F"))
        yield matrix("shared_down", (s, e), ("F", "E"))
    if moe.shared_gate:
        yield matrix("shared_gate", (e, 1), ("E", "one"), never_quantized=_ROUTES, dtype="activations")


def init_params(config: ModelConfig, key: PRNGKeyArray, *, dtype: DType = "float32", stack_layers: bool = True) -> Params:
    """Random parameters: normal with standard deviation 1/sqrt(fan in), neutral scales for norms, zeros for biases.

    The values do not depend on `stack_layers`.
    """
    import jax
    import jax.numpy as jnp

    def make(spec: WeightSpec, key: PRNGKeyArray) -> Array:
        if spec.initial is not None:
            return jnp.full(spec.shape, spec.initial, dtype)
        # A row of a table is read whole, so its entries are scaled by its width; a matrix by its number of inputs.
        fan_in = spec.shape[-1] if spec.kind is Kind.TABLE else spec.shape[-2]
        return (jax.random.normal(key, spec.shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    def make_all(specs: Mapping[str, WeightSpec], key: PRNGKeyArray) -> dict[str, Array]:
        return {name: make(spec, jax.random.fold_in(key, j)) for j, (name, spec) in enumerate(sorted(specs.items()))}

    keys = jax.random.split(key, config.num_layers + 1)
    layers = tuple(make_all(layer_specs(config, i), keys[i]) for i in range(config.num_layers))
    params: Params = make_all(model_specs(config), keys[-1])
    params["layers"] = stack(layers) if stack_layers else layers
    return params


def stack(layers: tuple[LayerWeights, ...]) -> dict[str, Leaf]:
    """One dict from L dicts: each weight, an array or a pytree of arrays, is stacked over the layers that have it."""
    import jax
    import jax.numpy as jnp

    names = dict.fromkeys(name for layer in layers for name in layer)
    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer[name] for layer in layers if name in layer))
        for name in names
    }


def unstack(layers: LayerWeights, config: ModelConfig) -> tuple[dict[str, Leaf], ...]:
    """The inverse of `stack`."""
    import jax

    having = layers_with(config)

    def row(name: str, layer: int) -> Leaf:
        return jax.tree.map(lambda leaf: leaf[having[name].index(layer)], layers[name])

    return tuple({name: row(name, i) for name in layer_specs(config, i)} for i in range(config.num_layers))
