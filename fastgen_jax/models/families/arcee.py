"""Arcee's AFM: Llama with a plain MLP and a squared ReLU."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("ArceeForCausalLM",)
FEATURES = "AFM-4.5B; every rotary scaling; biases"

NAMES = common.LLAMA_NAMES | {"layers.up": "model.layers.{layer}.mlp.up_proj"}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="arcee",
        **common.sizes(hf),
        **rotary(hf, max_context_len=4096),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="relu2"),
        mlp_gated=False,
        mlp_bias=hf.get("mlp_bias", False),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
