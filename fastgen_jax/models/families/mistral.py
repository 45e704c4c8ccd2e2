"""Mistral 7B and its descendants: Llama with a sliding window. Multimodal checkpoints are read without their vision part."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("MistralForCausalLM", "Mistral3ForConditionalGeneration")
FEATURES = "sliding window on all or some layers; explicit head_dim; every rotary scaling; Small 3.1/3.2 without images"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(
        family="mistral",
        **common.sizes(hf, assumed={"num_key_value_heads": 8}),
        **rotary(hf, max_context_len=131_072),
        layer_windows=common.windows(hf, hf.get("sliding_window", 4096), lambda layer: True),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
