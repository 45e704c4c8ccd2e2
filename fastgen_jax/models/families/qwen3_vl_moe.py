"""Qwen3-VL with experts: Qwen3-MoE with the experts of a layer in one tensor, and with images."""

from __future__ import annotations

import dataclasses

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, qwen3_moe
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.rope import for_qwen3_vl

ARCHITECTURES = ("Qwen3VLMoeForConditionalGeneration",)
FEATURES = "30B-A3B and 235B-A22B with images; experts in all or some layers; norms on queries and keys"

# Where they differ from those of Qwen3-MoE.
_DEFAULTS = {
    "max_position_embeddings": 128_000,
    "rope_theta": 500_000.0,
    "num_key_value_heads": 16,
    "num_experts_per_tok": 4,
}
_NUM_EXPERTS = 60


def config_from_hf(hf: JsonFields, *, strict: bool = False) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    text = _DEFAULTS | hf.get("text_config", {})
    if "num_experts" not in text:  # transformers 5 writes the other name
        text["num_experts"] = text.get("num_local_experts", _NUM_EXPERTS)
    config = qwen3_moe.config_from_hf({**hf, "text_config": text}, strict=strict)
    assert config.moe is not None, "Qwen3-MoE has experts"
    assert config.rope is not None, "all layers rotate"
    # The weights of the chosen experts are always normalized.
    moe = dataclasses.replace(config.moe, normalize=True)
    return dataclasses.replace(config, family="qwen3_vl_moe", moe=moe, rope=for_qwen3_vl(config.rope))


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    experts = "model.layers.{layer}.mlp.experts"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config),
            "layers.expert_gate_up": Source((f"{experts}.gate_up_proj",)),
            "layers.expert_down": Source((f"{experts}.down_proj",)),
        },
    )
