"""Gemma: norms that store weight - 1, embeddings times sqrt(E), gated tanh-GELU."""

from __future__ import annotations

import math

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("GemmaForCausalLM",)
FEATURES = "2B and 7B, version 1.1; CodeGemma"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    name = "hidden_activation" if hf.get("hidden_activation") else "hidden_act"
    activation = common.activation(hf, name, default="gelu_pytorch_tanh")
    hf.ignore("hidden_act")
    return ModelConfig(
        family="gemma",
        exceeds_float16=True,
        **common.sizes(hf, head_dim=256),
        **rotary(hf, max_context_len=8192),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        embed_multiplier=math.sqrt(hf["hidden_size"]),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation="gelu_tanh" if activation == "gelu" else activation,  # the first release says "gelu"
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
