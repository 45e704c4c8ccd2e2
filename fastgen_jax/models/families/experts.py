"""Shared code for naming the tensors of models with experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import Source
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
    if not config.moe.gated:
        return {
            "layers.router": f"{block}.{router}",
            "layers.expert_up": [f"{block}.experts.{i}.{up}" for i in experts],
            "layers.expert_down": [f"{block}.experts.{i}.{down}" for i in experts],
            "layers.shared_up": f"{block}.{shared}.{up}",
            "layers.shared_down": f"{block}.{shared}.{down}",
        }
    return {
        "layers.router": f"{block}.{router}",
        "layers.expert_gate_up": [f"{block}.experts.{i}.{part}" for i in experts for part in (gate, up)],
        "layers.expert_down": [f"{block}.experts.{i}.{down}" for i in experts],
        "layers.shared_gate_up": (f"{block}.{shared}.{gate}", f"{block}.{shared}.{up}"),
        "layers.shared_down": f"{block}.{shared}.{down}",
        "layers.shared_gate": f"{block}.{shared}_gate",
    }


_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def by_expert(config: ModelConfig, sources: Mapping[str, Source], names: Collection[str]) -> Mapping[str, Source]:
    """`sources` for a file with the tensors `names`, which may have a tensor for each expert instead of one for all.

    The FP8 releases of models that are published with one tensor have them so, and what transformers saves.
    """
    if config.moe is None:
        return sources
    found = dict(sources)
    for path in ("layers.expert_gate_up", "layers.expert_down"):
        joined = sources[path].names[0] if path in sources else ""
        block, _, last = joined.rpartition(".")
        if last not in _PARTS or joined.format(layer=config.moe.layers[0]) in names:
            continue
        each = tuple(f"{block}.{i}.{part}.weight" for i in range(config.moe.num_experts) for part in _PARTS[last])
        if each[0].format(layer=config.moe.layers[0]) in names:
            found[path] = Source(each, transpose=True, stacked=True)
    return found


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
