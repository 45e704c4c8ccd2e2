"""Granite 3: Llama with four multipliers, of embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("GraniteForCausalLM",)
FEATURES = "dense models; multipliers; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="granite",
        **common.sizes(hf),
        **rotary(hf, max_context_len=2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        embed_multiplier=float(hf.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(hf.get("residual_multiplier", 1.0)),
        logits_multiplier=1.0 / hf.get("logits_scaling", 1.0),
        attention_scale=float(hf.get("attention_multiplier", 1.0)),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
        mlp_bias=hf.get("mlp_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
