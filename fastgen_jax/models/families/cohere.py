"""Cohere's Command R (and Aya): one LayerNorm without bias, parallel attention and MLP, adjacent pairs rotated."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("CohereForCausalLM",)
FEATURES = "Command R and R+, Aya; norms on queries and keys; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    positions = rotary(hf, max_context_len=8192, theta=500_000.0)
    if hf.get("model_max_length"):  # the released models are used far beyond max_position_embeddings
        positions["max_context_len"] = hf["model_max_length"]
    return ModelConfig(
        family="cohere",
        **common.sizes(hf),
        **positions,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel_residual=True,
        shared_norm=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        logits_multiplier=hf.get("logit_scale", 0.0625),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="per_head" if hf.get("use_qk_norm", False) else None,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    d = config.head_dim
    return common.sources_from(
        config,
        common.LLAMA_NAMES,
        rearrange={
            "layers.qkv": common.adjacent_pairs_to_halves(config),
            "layers.q_norm": common.rope_pairs_to_halves(d, 1),  # [H, D]: each row is a head
            "layers.k_norm": common.rope_pairs_to_halves(d, 1),
        },
    )
