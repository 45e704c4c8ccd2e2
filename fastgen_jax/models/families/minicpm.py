"""MiniCPM 1 and 4, dense: Llama with multipliers of embeddings, residuals and logits that follow from its sizes."""

from __future__ import annotations

import math

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("MiniCPMForCausalLM",)
FEATURES = "MiniCPM 1B and 2B, MiniCPM4 without its sparse attention; multipliers; LongRoPE"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"sparse_config": (None,)})
    hf.ignore("sparse_config", "mup_denominator")  # the last one concerns heads for speculative decoding
    sizes, bias = common.sizes(hf), hf.get("attention_bias", False)
    return ModelConfig(
        family="minicpm",
        **sizes,
        **rotary(hf, max_context_len=2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        embed_multiplier=hf.get("scale_emb", 1),
        residual_multiplier=hf.get("scale_depth", 1) / math.sqrt(sizes["num_layers"]),
        logits_multiplier=hf.get("dim_model_base", 1) / sizes["embed_dim"],
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
