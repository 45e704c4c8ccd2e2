"""Every weight, declared once: initialisation, the checkpoint's shape check and sharding derive from this file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fastgen_jax.models.config import ModelConfig

Params = dict[str, Any]
"""`{"embed": [V, E], "layers": ..., "final_norm": [E], "lm_head": [E, V]}`; `lm_head` is absent when tied.

`layers` is either one dict of arrays stacked over a leading axis L (the form that `lax.scan` walks) or a tuple of
L dicts (the form whose layers are buffers of their own; see `models.decoder.run_layers`).
"""


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """Shape, logical axes (named by the letters of DESIGN) and initialiser of one weight, per layer where it has one."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """The specs of all weights, in the tree form of `Params`; the ones under "layers" are those of a single layer.

    Matrices are stored [in, out]. Projections that read the same input are one matrix: `qkv` holds the columns of
    all query heads, then all key heads, then all value heads; `gate_up` holds the gate, then the up projection.
    """
    v, e, f = config.vocab_size, config.embed_dim, config.mlp_dim
    h, k, d = config.num_heads, config.num_kv_heads, config.head_dim
    layer = {
        "attn_norm": ParamSpec(shape=(e,), axes=("E",), init="ones"),
        "qkv": ParamSpec(shape=(e, (h + 2 * k) * d), axes=("E", "HD")),
        "o": ParamSpec(shape=(h * d, e), axes=("HD", "E")),
        "mlp_norm": ParamSpec(shape=(e,), axes=("E",), init="ones"),
        "gate_up": ParamSpec(shape=(e, 2 * f), axes=("E", "F")),
        "down": ParamSpec(shape=(f, e), axes=("F", "E")),
    }
    if config.attention_bias:
        layer["qkv_bias"] = ParamSpec(shape=((h + 2 * k) * d,), axes=("HD",), init="zeros")
        layer["o_bias"] = ParamSpec(shape=(e,), axes=("E",), init="zeros")
    if config.mlp_bias:
        layer["gate_up_bias"] = ParamSpec(shape=(2 * f,), axes=("F",), init="zeros")
        layer["down_bias"] = ParamSpec(shape=(e,), axes=("E",), init="zeros")
    specs: dict[str, Any] = {
        "embed": ParamSpec(shape=(v, e), axes=("V", "E")),
        "layers": layer,
        "final_norm": ParamSpec(shape=(e,), axes=("E",), init="ones"),
    }
    if not config.tie_embeddings:
        specs["lm_head"] = ParamSpec(shape=(e, v), axes=("E", "V"))
    return specs


def count_params(config: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    specs = param_specs(config)
    layer = sum(math.prod(spec.shape) for spec in specs["layers"].values())
    rest = sum(math.prod(spec.shape) for name, spec in specs.items() if name != "layers")
    return rest + config.num_layers * layer


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
        fan_in = spec.shape[1] if spec.axes == ("V", "E") else spec.shape[0]
        return (jax.random.normal(key, spec.shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    specs = param_specs(config)
    layer_specs = specs.pop("layers")
    keys = jax.random.split(key, config.num_layers + 1)
    layers = tuple(
        {
            name: make(spec, jax.random.fold_in(keys[i], j))
            for j, (name, spec) in enumerate(sorted(layer_specs.items()))
        }
        for i in range(config.num_layers)
    )
    params: Params = {
        name: make(spec, jax.random.fold_in(keys[-1], j)) for j, (name, spec) in enumerate(sorted(specs.items()))
    }
    params["layers"] = stack(layers) if stack_layers else layers
    return params


def stack(layers: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One dict of [L, ...] arrays from L dicts."""
    import jax.numpy as jnp

    return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
