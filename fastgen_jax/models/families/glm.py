"""GLM-4 9B of 2024: Llama with biases on queries, keys and values, and adjacent pairs of half of each head rotated."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import ModelFields, Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("GlmForCausalLM",)
FEATURES = "GLM-4 9B, GLM-Edge; part of each head rotated; biases"

NAMES = common.LLAMA_NAMES | {"layers.gate_up": "model.layers.{layer}.mlp.gate_up_proj"}


def fields(hf: Fields) -> ModelFields:
    """The fields that GLM-4 of 2024 and of 2025 share, as keyword arguments of `ModelConfig`."""
    sizes = common.sizes(hf, head_dim=128, assumed={"num_key_value_heads": 2})
    return {
        **sizes,
        **rotary(hf, max_context_len=131_072, head_dim=sizes["head_dim"], partial=0.5),
        "norm_eps": hf.get("rms_norm_eps", 1.5625e-7),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "qkv_bias": hf.get("attention_bias", True),
        "activation": common.activation(hf, default="silu"),
    }


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(family="glm", **fields(hf))


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.adjacent_pairs_to_halves(config)})
