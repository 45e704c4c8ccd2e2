"""Shared code for naming the tensors of models with experts."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.fields import Fields


def expert_names(
    config: ModelConfig,
    *,
    block: str = "model.layers.{layer}.mlp",
    router: str = "gate",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    shared: str = "shared_expert",
) -> dict[str, str | Sequence[str]]:
    """The modules of the router, the experts and the shared expert, for `sources_from`.

    They are in the module `block`: expert 3 is `<block>.experts.3`, with the matrices `gate`, `up` and `down`.
    """
    assert config.moe is not None, "only families with experts name them"
    experts = range(config.moe.num_experts)
    return {
        "layers.router": f"{block}.{router}",
        "layers.expert_gate_up": [f"{block}.experts.{i}.{part}" for i in experts for part in (gate, up)],
        "layers.expert_down": [f"{block}.experts.{i}.{down}" for i in experts],
        "layers.shared_gate_up": (f"{block}.{shared}.{gate}", f"{block}.{shared}.{up}"),
        "layers.shared_down": f"{block}.{shared}.{down}",
        "layers.shared_gate": f"{block}.{shared}_gate",
    }


def sparse_layers(num_layers: int, *, step: int, dense: Sequence[int]) -> tuple[int, ...]:
    """The layers with experts: every `step`th, counted from one, except those in `dense`."""
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)


def layers_of_type(hf: Fields, otherwise: Sequence[int]) -> tuple[int, ...]:
    """The layers with experts: those that `mlp_layer_types` calls "sparse", or else `otherwise`."""
    types = hf.get("mlp_layer_types")
    if types is None:
        return tuple(otherwise)
    if len(types) != hf["num_hidden_layers"] or set(types) - {"sparse", "dense"}:
        raise ValueError(
            f"config.json has mlp_layer_types={types!r}; supported: 'sparse' or 'dense' for each of the "
            f"{hf['num_hidden_layers']} layers"
        )
    return tuple(layer for layer, kind in enumerate(types) if kind == "sparse")
