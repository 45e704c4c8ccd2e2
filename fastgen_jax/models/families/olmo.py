"""OLMo 1 (arXiv:2402.00838): Llama with LayerNorms without scale and bias, and clipped queries, keys and values."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("OlmoForCausalLM",)
FEATURES = "1B and 7B in the format of transformers; clipping of q, k and v; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="olmo",
        **common.sizes(hf, assumed={"vocab_size": 50_304}),
        **rotary(hf, max_context_len=2048),
        norm="layer",
        norm_scale=False,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        clip_qkv=hf.get("clip_qkv"),
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
