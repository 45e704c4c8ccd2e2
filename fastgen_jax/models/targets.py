"""What low-rank adapters (arXiv:2106.09685) may change, and their form as a pytree beside the weights."""

from __future__ import annotations

from typing import Any, TypeAlias

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import param_specs, plain_name
from fastgen_jax.models.weight_spec import Kind, WeightSpec

Lora: TypeAlias = dict[str, Any]
"""`{"layers": {"qkv": ({"a": [L, in, r], "b": [L, r, out]}, ...), ...}}`: a pair for each projection that a matrix fuses."""

ATTENTION = ("qkv", "q", "q_a", "q_b", "kv_a", "o")
STATE = ("mix_in", "mix_gates", "mix_out")
MLP = ("gate_up", "up", "down")


def adaptable(config: ModelConfig, *, divided: bool = False) -> dict[str, WeightSpec]:
    """The matrices of a layer that an adapter may change: those of attention, state and MLP, without experts.

    With `divided`, those of an engine on several devices: without the state, whose columns have an order of their own there.
    """
    specs = param_specs(config)["layers"]
    names = (*ATTENTION, *(() if divided else STATE), *MLP)
    return {
        name: spec
        for plain in names
        for name, spec in specs.items()
        if plain_name(name) == plain and spec.kind is Kind.MATRIX
    }
