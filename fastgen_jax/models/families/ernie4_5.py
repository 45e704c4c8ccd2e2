"""ERNIE 4.5, dense: Llama with adjacent pairs rotated, and one switch for all biases."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
FEATURES = "0.3B; with or without biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("use_bias", False)
    return ModelConfig(
        family="ernie4_5",
        **common.sizes(hf, head_dim=128, assumed={"num_key_value_heads": 2}),
        **rotary(hf, max_context_len=131_072, theta=500_000.0),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
        mlp_bias=bias,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES, rearrange={"layers.qkv": common.adjacent_pairs_to_halves(config)})
