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
FEATURES = "experts and a gated shared one; dense layers among them; biases; no window"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"hidden_act": ("silu",), "use_sliding_window": (False,)})
    # With use_sliding_window off, the other window fields have no effect.
    hf.ignore("hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return ModelConfig(
        family="qwen2_moe",
        **common.sizes(hf),
        **rotary(hf, max_context_len=32_768),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=hf.get("qkv_bias", True),
        tie_embeddings=hf.get("tie_word_embeddings", False),
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
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, {**common.LLAMA_NAMES, **expert_names(config)})
