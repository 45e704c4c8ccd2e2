"""Every weight, declared once: initialisation, the checkpoint's shape check and sharding derive from this file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.moe_config import MLAConfig, MoEConfig

Params = dict[str, Any]
"""`{"embed": [V, E], "layers": ..., "final_norm": [E], "lm_head": [E, V], ...}`, as `param_specs` declares them.

`layers` is either one dict of arrays, each stacked over the layers that have it (the form that `lax.scan` walks), or a
tuple of L dicts (the form whose layers are buffers of their own; see `models.decoder.run_layers`).
"""

EXPERT_MATRICES = ("expert_gate_up", "expert_down")
"""Weights [X, in, out], one matrix an expert, which only the tokens of that expert meet."""


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """Shape, logical axes (named by the letters of DESIGN) and initialiser of one weight, per layer where it has one."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    parts: tuple[int, ...] = ()  # widths of the projections that lie side by side in the last axis; (): a single one


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """The specs of all weights, in the tree form of `Params`; the ones under "layers" are those of a single layer.

    Matrices are stored [in, out]. Projections that read the same input are one matrix: `qkv` holds the columns of
    all query heads, then all key heads, then all value heads; `gate_up` holds the gate, then the up projection.
    Where layers differ, "layers" holds what any of them has; `layer_specs` says what a certain one has.
    """
    v, e = config.vocab_size, config.embed_dim
    p = config.embed_proj_dim or e
    specs: dict[str, Any] = {"embed": ParamSpec(shape=(v, p), axes=("V", "E"))}
    if config.embed_proj_dim is not None:
        specs["project_in"] = ParamSpec(shape=(p, e), axes=("P", "E"))
        specs["project_out"] = ParamSpec(shape=(e, p), axes=("E", "P"))
    if config.learned_positions:
        rows = config.learned_positions
        specs["position_embed"] = ParamSpec(shape=(rows, e), axes=("positions", "E"))
    if config.embed_norm:
        specs |= _norm_specs("embed_norm", config)
    specs["layers"] = {name: spec for layer in range(config.num_layers) for name, spec in layer_specs(config, layer).items()}
    if config.final_norm:
        specs |= _norm_specs("final_norm", config)
    if not config.tie_embeddings:
        specs["lm_head"] = ParamSpec(shape=(p, v), axes=("E", "V"))
    if config.head_bias:
        specs["lm_head_bias"] = ParamSpec(shape=(v,), axes=("V",), init="zeros")
    return specs


def layer_specs(config: ModelConfig, layer: int) -> dict[str, ParamSpec]:
    """The specs of the weights of layer number `layer`: the norms, then the attention, then the MLP."""
    specs: dict[str, ParamSpec] = {}
    before, after = config.norm_placement in ("input", "both"), config.norm_placement in ("output", "both")
    at_residual = config.norm_placement == "residual"
    if before or at_residual:
        specs |= _norm_specs("attn_norm", config)
        if not config.shared_norm:
            specs |= _norm_specs("mlp_norm", config)
    if after:
        specs |= _norm_specs("post_attn_norm", config) | _norm_specs("post_mlp_norm", config)
    specs |= _attention_specs(config)
    if config.moe is not None and layer in config.moe.layers:
        return specs | moe_specs(config.embed_dim, config.moe)
    return specs | _mlp_specs(config)


def _norm_specs(name: str, config: ModelConfig) -> dict[str, ParamSpec]:
    e = config.embed_dim
    specs = {name: ParamSpec(shape=(e,), axes=("E",), init="zeros" if config.norm_offset else "ones")}
    if config.norm_bias:
        specs[f"{name}_bias"] = ParamSpec(shape=(e,), axes=("E",), init="zeros")
    return specs


def _attention_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    e, h, k, d = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    if config.mla is not None:
        return _latent_attention_specs(config, config.mla)
    parts = (h * d, k * d, k * d)
    specs = {
        "qkv": ParamSpec(shape=(e, sum(parts)), axes=("E", "HD"), parts=parts),
        "o": ParamSpec(shape=(h * d, e), axes=("HD", "E")),
    }
    if config.qkv_bias:
        specs["qkv_bias"] = ParamSpec(shape=(sum(parts),), axes=("HD",), init="zeros", parts=parts)
    if config.o_bias:
        specs["o_bias"] = ParamSpec(shape=(e,), axes=("E",), init="zeros")
    if config.attention_sinks:
        specs["sinks"] = ParamSpec(shape=(h,), axes=("H",), init="zeros")
    if config.qk_norm is not None:
        ones = "zeros" if config.norm_offset else "ones"
        for name, heads in {"q_norm": h, "k_norm": k}.items():
            shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
                "head": ((d,), ("D",)),
                "per_head": ((heads, d), ("H", "D")),
                "row": ((heads * d,), ("HD",)),
            }
            shape, axes = shapes[config.qk_norm]
            specs[name] = ParamSpec(shape=shape, axes=axes, init=ones)
            if config.qk_norm_bias:
                specs[f"{name}_bias"] = ParamSpec(shape=shape, axes=axes, init="zeros")
    return specs


def _latent_attention_specs(config: ModelConfig, mla: MLAConfig) -> dict[str, ParamSpec]:
    e, h = config.embed_dim, config.num_heads
    queries, latent = h * (mla.nope_dim + mla.rope_dim), mla.kv_rank + mla.rope_dim
    specs = {
        "kv_a": ParamSpec(shape=(e, latent), axes=("E", "latent")),
        "kv_a_norm": ParamSpec(shape=(mla.kv_rank,), axes=("latent",), init="ones"),
        "kv_b": ParamSpec(shape=(mla.kv_rank, h * (mla.nope_dim + mla.v_dim)), axes=("latent", "HD")),
        "o": ParamSpec(shape=(h * mla.v_dim, e), axes=("HD", "E")),
    }
    if mla.q_rank is None:
        specs["q"] = ParamSpec(shape=(e, queries), axes=("E", "HD"))
    else:
        specs["q_a"] = ParamSpec(shape=(e, mla.q_rank), axes=("E", "latent"))
        specs["q_a_norm"] = ParamSpec(shape=(mla.q_rank,), axes=("latent",), init="ones")
        specs["q_b"] = ParamSpec(shape=(mla.q_rank, queries), axes=("latent", "HD"))
    if mla.kv_bias:
        specs["kv_a_bias"] = ParamSpec(shape=(latent,), axes=("latent",), init="zeros")
        if mla.q_rank is not None:
            specs["q_a_bias"] = ParamSpec(shape=(mla.q_rank,), axes=("latent",), init="zeros")
    if config.o_bias:
        specs["o_bias"] = ParamSpec(shape=(e,), axes=("E",), init="zeros")
    return specs


def _mlp_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    e, f = config.embed_dim, config.mlp_dim
    name, parts = ("gate_up", (f, f)) if config.mlp_gated else ("up", (f,))
    specs = {
        name: ParamSpec(shape=(e, sum(parts)), axes=("E", "F"), parts=parts),
        "down": ParamSpec(shape=(f, e), axes=("F", "E")),
    }
    if config.mlp_bias:
        specs[f"{name}_bias"] = ParamSpec(shape=(sum(parts),), axes=("F",), init="zeros", parts=parts)
        specs["down_bias"] = ParamSpec(shape=(e,), axes=("E",), init="zeros")
    return specs


def moe_specs(e: int, moe: MoEConfig) -> dict[str, ParamSpec]:
    """The specs of a layer's router and experts, for `e` numbers a token."""
    x, f, s = moe.num_experts, moe.expert_dim, moe.shared_dim
    specs = {
        "router": ParamSpec(shape=(e, x), axes=("E", "X")),
        "expert_gate_up": ParamSpec(shape=(x, e, 2 * f), axes=("X", "E", "F"), parts=(f, f)),
        "expert_down": ParamSpec(shape=(x, f, e), axes=("X", "F", "E")),
    }
    if moe.router_bias:
        specs["router_bias"] = ParamSpec(shape=(x,), axes=("X",), init="zeros")
    if moe.choice_bias:
        specs["choice_bias"] = ParamSpec(shape=(x,), axes=("X",), init="zeros")
    if moe.expert_bias:
        specs["expert_gate_up_bias"] = ParamSpec(shape=(x, 2 * f), axes=("X", "F"), init="zeros", parts=(f, f))
        specs["expert_down_bias"] = ParamSpec(shape=(x, e), axes=("X", "E"), init="zeros")
    if s:
        specs["shared_gate_up"] = ParamSpec(shape=(e, 2 * s), axes=("E", "F"), parts=(s, s))
        specs["shared_down"] = ParamSpec(shape=(s, e), axes=("F", "E"))
    if moe.shared_gate:
        specs["shared_gate"] = ParamSpec(shape=(e, 1), axes=("E", "one"))
    return specs


def layers_with(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The numbers of the layers that have each weight: the rows of its stacked form, in order."""
    having: dict[str, list[int]] = {}
    for layer in range(config.num_layers):
        for name in layer_specs(config, layer):
            having.setdefault(name, []).append(layer)
    return {name: tuple(layers) for name, layers in having.items()}


def count_params(config: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    specs = param_specs(config)
    layers = sum(math.prod(spec.shape) for i in range(config.num_layers) for spec in layer_specs(config, i).values())
    return layers + sum(math.prod(spec.shape) for name, spec in specs.items() if name != "layers")


def count_products(config: ModelConfig, *, sampled: bool) -> int:
    """Multiplications of one token with the matrices it meets, those of the vocabulary head if it is `sampled`."""
    p = config.embed_proj_dim or config.embed_dim
    total = p * config.vocab_size if sampled else 0
    if config.embed_proj_dim is not None:
        total += config.embed_dim * p * (1 + sampled)
    for layer in range(config.num_layers):
        for name, spec in layer_specs(config, layer).items():
            if name in EXPERT_MATRICES and config.moe is not None:
                total += math.prod(spec.shape) * config.moe.experts_per_token // config.moe.num_experts
            elif len(spec.shape) == 2 and "norm" not in name and "bias" not in name:
                total += math.prod(spec.shape)
    return total


def init_params(config: ModelConfig, key: Any, *, dtype: Any = None, stack_layers: bool = True) -> Params:
    """Random parameters: normal with standard deviation 1/sqrt(fan in), ones for norms, zeros for biases.

    `dtype` defaults to float32. The values do not depend on `stack_layers`.
    """
    import jax
    import jax.numpy as jnp

    dtype = dtype or jnp.float32

    def make(spec: ParamSpec, key: Any) -> Any:
        if spec.init != "normal":
            return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)
        # An embedding row is read whole, so its entries are scaled by its width; a matrix by its number of inputs.
        fan_in = spec.shape[-1] if spec.axes[0] in ("V", "positions") else spec.shape[-2]
        return (jax.random.normal(key, spec.shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    specs = param_specs(config)
    del specs["layers"]
    keys = jax.random.split(key, config.num_layers + 1)
    layers = tuple(
        {
            name: make(spec, jax.random.fold_in(keys[i], j))
            for j, (name, spec) in enumerate(sorted(layer_specs(config, i).items()))
        }
        for i in range(config.num_layers)
    )
    params: Params = {
        name: make(spec, jax.random.fold_in(keys[-1], j)) for j, (name, spec) in enumerate(sorted(specs.items()))
    }
    params["layers"] = stack(layers) if stack_layers else layers
    return params


def stack(layers: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One dict from L dicts: every weight, array or pytree of arrays, stacked over the layers that have it."""
    import jax
    import jax.numpy as jnp

    names = dict.fromkeys(name for layer in layers for name in layer)
    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer[name] for layer in layers if name in layer))
        for name in names
    }


def unstack(layers: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ...]:
    """The inverse of `stack`."""
    import jax

    having = layers_with(config)

    def row(name: str, layer: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[having[name].index(layer)], layers[name])

    return tuple({name: row(name, i) for name in layer_specs(config, i)} for i in range(config.num_layers))
