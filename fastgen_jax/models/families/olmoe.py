"""OLMoE: query and key norms span all heads; 64 small experts, none shared."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("OlmoeForCausalLM",)
FEATURES = "experts; norms over all heads, clipping of q, k and v; biases"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="olmoe",
        **common.sizes(hf),
        **rotary(hf, max_context_len=4096),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="row",
        clip_qkv=hf.get("clip_qkv"),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        moe=MoEConfig(
            num_experts=hf.first("num_experts", "num_local_experts", default=64),
            experts_per_token=hf.get("num_experts_per_tok", 8),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(hf["num_hidden_layers"])),
            normalize=hf.get("norm_topk_prob", False),
            activation=common.activation(hf, default="silu"),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, {**common.LLAMA_NAMES, **expert_names(config)})
