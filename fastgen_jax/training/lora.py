"""Low-rank adapters (arXiv:2106.09685) as a pytree beside the weights: the leaves to train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import layers_with, param_specs
from fastgen_jax.models.targets import Lora, adaptable
from fastgen_jax.models.weight_spec import Kind, Params


def lora_params(
    config: ModelConfig, rank: int, key: jax.Array, *, targets: Sequence[str] | None = None, dtype: Any = "float32"
) -> Lora:
    """Adapters that change nothing yet: `a` is random as in PEFT, uniform within 1/sqrt(inputs), and `b` is zero.

    `targets` are names of matrices of a layer, as in `param_specs`; None: all of attention and MLP. Projections that are
    fused in one matrix, such as q, k and v, have an adapter each. Raises ValueError for another target or a rank below 1.
    """
    specs, having = param_specs(config)["layers"], layers_with(config)
    known = list(adaptable(config))
    if rank < 1:
        raise ValueError(f"rank is {rank}, but must be at least 1")
    for name in targets or ():
        if name not in specs or specs[name].kind is not Kind.MATRIX:
            raise ValueError(
                f"targets has {name!r}, which is not a matrix of this model's layers; choose from {', '.join(known)}"
            )
    layers = {}
    for j, name in enumerate(known if targets is None else targets):
        count, (inputs, outputs) = len(having[name]), specs[name].shape
        widths = specs[name].parts or (outputs,)
        keys = jax.random.split(jax.random.fold_in(key, j), len(widths))
        bound = 1.0 / math.sqrt(inputs)
        layers[name] = tuple(
            {
                "a": jax.random.uniform(part, (count, inputs, rank), jnp.float32, -bound, bound).astype(dtype),
                "b": jnp.zeros((count, rank, width), dtype),
            }
            for part, width in zip(keys, widths, strict=True)
        )
    return {"layers": layers}


def merge_lora(params: Params, lora: Lora, *, scale: float) -> Params:
    """Stacked `params` with `scale` times the products of the adapters added; differentiable with respect to both.

    `scale` is alpha / rank in PEFT, with rank-stabilized adapters alpha / sqrt(rank). Everything that takes `params` takes
    the result. The gradient of a loss of `merge_lora(params, lora)` with respect to `lora` alone trains the adapters.

    Raises ValueError if the layers are separate or in an engine's own form.
    """
    layers = params["layers"]
    if not isinstance(layers, Mapping):
        raise ValueError("layers are separate, but adapters are stacked; load the weights with stack_layers=True")

    def changed(name: str) -> jax.Array:
        weight = layers[name]
        if not isinstance(weight, jax.Array | np.ndarray):
            raise ValueError(
                f"{name!r} is a {type(weight).__name__}, the form in which an engine multiplies; merge into the arrays of "
                "load_params(..., stack_layers=True)"
            )
        changes = [jnp.matmul(part["a"], part["b"]) for part in lora["layers"][name]]
        return jnp.asarray(weight) + (scale * jnp.concatenate(changes, axis=-1)).astype(weight.dtype)

    return {**params, "layers": {**layers, **{name: changed(name) for name in lora["layers"]}}}
