"""LFM2 with experts, chosen by sigmoid scores with a bias, in all but the first layers."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.lfm2 import LAYER, NAMES, convolutions
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Lfm2MoeForCausalLM",)
FEATURES = "short convolutions, with or without biases; experts in all but the first layers"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(
        family="lfm2_moe",
        **common.sizes(hf),
        **convolutions(hf),
        moe=MoEConfig(
            num_experts=hf.get("num_experts", 32),
            experts_per_token=hf.get("num_experts_per_tok", 4),
            expert_dim=hf.get("moe_intermediate_size", 1792),
            layers=tuple(range(hf.get("num_dense_layers", 2), hf["num_hidden_layers"])),
            scores="sigmoid",
            choice_bias=hf.get("use_expert_bias", True),
            normalize=hf.get("norm_topk_prob", True),
            scale=hf.get("routed_scaling_factor", 1.0),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    block = f"{LAYER}.feed_forward"
    return common.sources_from(
        config,
        {
            **NAMES,
            **expert_names(config, block=block, gate="w1", up="w3", down="w2"),
            "layers.choice_bias": Source((f"{block}.expert_bias",)),
        },
    )
