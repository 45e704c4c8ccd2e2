"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): query and key norms, 128 experts, none shared."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names, sparse_layers
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
FEATURES = "experts in all or some layers; norms on queries and keys; window"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    supported = {"use_qk_norm": (True,), "qkv_bias": (False,)}
    common.refuse_unsupported(hf, supported)
    hf.ignore(*supported, "max_window_layers")  # a window applies to all layers, unlike in Qwen3
    bias, activation = hf.get("attention_bias", False), common.activation(hf, default="silu")
    window = hf.get("sliding_window", 4096)
    has_window = hf.get("use_sliding_window", False) and window is not None
    return ModelConfig(
        family="qwen3_moe",
        **common.sizes(hf, assumed={"num_key_value_heads": 4}),
        **rotary(hf, max_context_len=32_768),
        layer_windows=(window,) * hf["num_hidden_layers"] if has_window else (),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=activation,
        moe=MoEConfig(
            num_experts=hf.first("num_experts", "num_local_experts", default=128),
            experts_per_token=hf.get("num_experts_per_tok", 8),
            expert_dim=hf["moe_intermediate_size"],
            layers=sparse_layers(
                hf["num_hidden_layers"],
                step=hf.get("decoder_sparse_step", 1),
                dense=hf.get("mlp_only_layers") or (),
            ),
            normalize=hf.get("norm_topk_prob", False),
            activation=activation,
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, {**common.LLAMA_NAMES, **expert_names(config)})
