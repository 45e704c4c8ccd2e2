"""Llama 1, 2 and 3, and the checkpoints that share their architecture (SmolLM2, TinyLlama, Vicuna, Yi, ...)."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import (
    LLAMA_NAMES,
    Fields,
    Source,
    activation,
    reads_every_field,
    refuse_unsupported,
    sizes,
    sources_from,
)
from fastgen_jax.models.families.rope import rope_from_hf

ARCHITECTURES = ("LlamaForCausalLM",)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`, written by transformers 4 or 5."""
    refuse_unsupported(hf, {"rope_interleaved": (False,)})
    max_context_len = hf.get("max_position_embeddings", 2048)
    rope = rope_from_hf(hf, max_context_len=max_context_len)
    if rope.kind == "dynamic":  # its whole point is to read on beyond the trained length, up to `factor` times as far
        max_context_len = int(max_context_len * rope.factor)
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="llama",
        **sizes(hf),
        max_context_len=max_context_len,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        activation=activation(hf, default="silu"),
        mlp_bias=hf.get("mlp_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each weight of `param_specs` lies in the checkpoint; `{layer}` stands for the layer's number."""
    return sources_from(config, LLAMA_NAMES)
