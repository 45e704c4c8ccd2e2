"""Qwen3.5 and Qwen3.6 with experts: the layers of Qwen3.5, and in each of them many small experts and a gated shared one."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.qwen3_5 import delta_net_names
from fastgen_jax.models.families.qwen3_next import delta_net_model
from fastgen_jax.models.families.state_layers import queries_and_gates
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
FEATURES = "gated delta nets and gated attention; experts in one tensor a layer or one each; without images"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    hf.ignore("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "intermediate_size")  # leftovers of Qwen3-Next
    expert_dim = hf.get("moe_intermediate_size", 512)
    model = delta_net_model(hf)
    return ModelConfig(
        family="qwen3_5_moe",
        **common.sizes(hf, head_dim=256, mlp_dim=expert_dim),
        **model,
        moe=MoEConfig(
            num_experts=hf.get("num_experts", 256),
            experts_per_token=hf.get("num_experts_per_tok", 8),
            expert_dim=expert_dim,
            layers=tuple(range(hf["num_hidden_layers"])),
            normalize=True,
            shared_dim=hf.get("shared_expert_intermediate_size", 512),
            shared_gate=True,
            activation=model["activation"],
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    experts = "model.layers.{layer}.mlp.experts"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **delta_net_names(),
            **expert_names(config),
            "layers.expert_gate_up": Source((f"{experts}.gate_up_proj",), transpose=True),
            "layers.expert_down": Source((f"{experts}.down_proj",), transpose=True),
        },
        rearrange={"layers.qkv": queries_and_gates(config.num_heads, config.head_dim)},
    )
