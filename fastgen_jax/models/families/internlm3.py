"""InternLM 3: Llama with one switch for the biases of queries, keys and values, and one for all others."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("InternLM3ForCausalLM",)
FEATURES = "8B; linear and dynamic rotary scaling; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("bias", False)
    return ModelConfig(
        family="internlm3",
        **common.sizes(hf),
        **rotary(hf, max_context_len=32_768),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("qkv_bias", False),
        o_bias=bias,
        activation=common.activation(hf, default="silu"),
        mlp_bias=bias,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
