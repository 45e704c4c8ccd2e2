"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): many small experts and a shared one that a sigmoid scales."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names, sparse_layers
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Qwen2MoeForCausalLM",)
FEATURES = "experts and a gated shared one; dense layers among them; biases; windows"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    activation = common.activation(hf, default="silu")
    return ModelConfig(
        family="qwen2_moe",
        **common.sizes(hf),
        **rotary(hf, max_context_len=32_768),
        layer_windows=_window_layers(hf),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=hf.get("qkv_bias", True),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=activation,
        moe=MoEConfig(
            num_experts=hf.get("num_experts", 60),
            experts_per_token=hf.get("num_experts_per_tok", 4),
            expert_dim=hf["moe_intermediate_size"],
            layers=sparse_layers(
                hf["num_hidden_layers"],
                step=hf.get("decoder_sparse_step", 1),
                dense=hf.get("mlp_only_layers") or (),
            ),
            normalize=hf.get("norm_topk_prob", False),
            shared_dim=hf["shared_expert_intermediate_size"],
            shared_gate=True,
            activation=activation,
        ),
    )


def _window_layers(hf: Fields) -> tuple[int | None, ...]:
    """The windows: in every second layer below max_window_layers, unlike in Qwen2, where they begin at that layer."""
    size, stop = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    given = size if hf.get("use_sliding_window", False) else None
    return common.windows(hf, given or None, lambda layer: layer < stop and layer % 2 == 0)


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, {**common.LLAMA_NAMES, **expert_names(config)})
