"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): normalised heads, 128 experts, none shared."""

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
from fastgen_jax.models.families.experts import expert_names, sparse_layers
from fastgen_jax.models.families.rope import rope_from_hf
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`, written by transformers 4 or 5."""
    refuse_unsupported(hf, {"hidden_act": ("silu",), "use_sliding_window": (False,)})
    # With use_sliding_window off, what it would do does not matter.
    hf.first("hidden_act", "use_sliding_window", "sliding_window", "max_window_layers")
    max_context_len = hf.get("max_position_embeddings", 32_768)
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="qwen3_moe",
        **sizes(hf),
        max_context_len=max_context_len,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope_from_hf(hf, max_context_len=max_context_len),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        moe=MoEConfig(
            num_experts=hf.first("num_experts", "num_local_experts", default=128),
            experts_per_token=hf.get("num_experts_per_tok", 8),
            expert_dim=hf["moe_intermediate_size"],
            layers=sparse_layers(
                hf["num_hidden_layers"], step=hf.get("decoder_sparse_step", 1), dense=hf.get("mlp_only_layers") or (),
            ),
            normalize=hf.get("norm_topk_prob", False),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each weight of `param_specs` lies in the checkpoint; `{layer}` stands for the layer's number."""
    return sources_from(config, {**LLAMA_NAMES, **expert_names(config)})
