"""Seed-OSS: Llama with biases on queries, keys and values, and a separate switch for the bias of the output projection."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("SeedOssForCausalLM",)
FEATURES = "36B; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(
        family="seed_oss",
        **common.sizes(hf, head_dim=128, assumed={"num_key_value_heads": 8}),
        **rotary(hf, max_context_len=524_288),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", True),
        o_bias=hf.get("attention_out_bias", False),
        activation=common.activation(hf, default="silu"),
        mlp_bias=hf.get("mlp_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
