"""Mistral 7B and its descendants: Llama with a sliding window. Multimodal checkpoints are read without their vision part.

Ministral 3 and Devstral 2 scale the queries beyond the context length of training.
"""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig, QueryGrowth
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import ModelFields, Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary, with_settings

ARCHITECTURES = (
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration",
)
FEATURES = (
    "sliding window on all or some layers; explicit head_dim; every rotary scaling; Small 3.1/3.2, Ministral 3 and "
    "Devstral 2 without images"
)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(
        family="mistral",
        **common.sizes(hf, assumed={"num_key_value_heads": 8}),
        **_positions(hf),
        layer_windows=common.windows(hf, hf.get("sliding_window", 4096) or None, lambda layer: True),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=common.activation(hf, default="silu"),
    )


def _positions(hf: Fields) -> ModelFields:
    """The rotary settings, and `query_growth` of Ministral 3, which is among them in config.json."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta is None:
        return rotary(hf, max_context_len=131_072)
    plain = {name: value for name, value in rope.items() if name not in ("llama_4_scaling_beta", "max_position_embeddings")}
    growth = QueryGrowth(weight=beta, length=plain["original_max_position_embeddings"])
    return rotary(with_settings(hf, plain), max_context_len=262_144) | {"query_growth": growth}


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
