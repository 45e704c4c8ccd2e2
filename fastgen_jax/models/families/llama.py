"""Llama 1, 2 and 3, and the checkpoints that share their architecture (SmolLM2, TinyLlama, Vicuna, Yi, ...)."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")
FEATURES = "every rotary scaling; biases; explicit head_dim; tied or separate head"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`, written by transformers 4 or 5."""
    common.refuse_unsupported(hf, {"rope_interleaved": (False,)})
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="llama",
        **common.sizes(hf),
        **rotary(hf, max_context_len=2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
        mlp_bias=hf.get("mlp_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`; `{layer}` stands for the number of the layer."""
    return common.sources_from(config, common.LLAMA_NAMES)
