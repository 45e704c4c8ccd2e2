"""Qwen3-VL with experts, text: Qwen3-MoE with the experts of a layer in one tensor, read without its vision part."""

from __future__ import annotations

import dataclasses

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, qwen3_moe
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names

ARCHITECTURES = ("Qwen3VLMoeForConditionalGeneration",)
FEATURES = "30B-A3B and 235B-A22B without images; experts in all or some layers; norms on queries and keys"


def config_from_hf(hf: JsonFields, *, strict: bool = False) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    config = qwen3_moe.config_from_hf(hf, strict=strict)
    assert config.moe is not None, "Qwen3-MoE has experts"
    # The weights of the chosen experts are always normalized.
    return dataclasses.replace(config, family="qwen3_vl_moe", moe=dataclasses.replace(config.moe, normalize=True))


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
