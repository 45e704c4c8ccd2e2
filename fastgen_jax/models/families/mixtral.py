"""Mixtral: Mistral with eight experts in every layer, two of them for each token."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import (
    LLAMA_NAMES,
    Fields,
    Source,
    reads_every_field,
    refuse_unsupported,
    sizes,
    sources_from,
)
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.rope import rope_from_hf
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("MixtralForCausalLM",)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`, written by transformers 4 or 5."""
    refuse_unsupported(hf, {"hidden_act": ("silu",), "attention_bias": (False,)})
    hf.first("hidden_act", "attention_bias", "router_jitter_noise")  # the last: noise while training
    max_context_len = hf.get("max_position_embeddings", 131_072)
    window = hf.get("sliding_window")
    num_layers = hf["num_hidden_layers"]
    return ModelConfig(
        family="mixtral",
        **sizes(hf),
        max_context_len=max_context_len,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        rope=rope_from_hf(hf, max_context_len=max_context_len, theta=1e6),
        layer_windows=(window,) * num_layers if window else (),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", default=8),
            experts_per_token=hf.get("num_experts_per_tok", 2),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(num_layers)),
            normalize=True,
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each weight of `param_specs` lies in the checkpoint; `{layer}` stands for the layer's number."""
    block = "model.layers.{layer}.block_sparse_moe"
    return sources_from(config, {**LLAMA_NAMES, **expert_names(config, block=block, gate="w1", up="w3", down="w2")})
