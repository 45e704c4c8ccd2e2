"""Nemotron-4 and Minitron: LayerNorms that store weight - 1, a plain MLP with a squared ReLU, part of each head rotated."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("NemotronForCausalLM",)
FEATURES = "Nemotron-4, Minitron 4B and 8B; part of each head rotated; biases"

NAMES = common.LLAMA_NAMES | {"layers.up": "model.layers.{layer}.mlp.up_proj"}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    sizes, bias = common.sizes(hf), hf.get("attention_bias", False)
    common.refuse_unsupported(hf, {"kv_channels": (sizes["head_dim"],)})  # a copy
    hf.ignore("kv_channels")
    return ModelConfig(
        family="nemotron",
        **sizes,
        **rotary(hf, max_context_len=4096, head_dim=sizes["head_dim"], partial=0.5),
        norm="layer",
        norm_eps=hf.get("norm_eps", 1e-5),
        norm_bias=True,
        norm_offset=1.0,
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
