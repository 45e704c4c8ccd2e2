"""Mixtral: Mistral with eight experts in every layer, two per token."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("MixtralForCausalLM",)
FEATURES = "top-2 of 8 experts in every layer; window; every rotary scaling"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"attention_bias": (False,)})
    hf.ignore("attention_bias", "router_jitter_noise")  # the last one is noise for training
    return ModelConfig(
        family="mixtral",
        **common.sizes(hf, assumed={"num_key_value_heads": 8}),
        **rotary(hf, max_context_len=131_072, theta=1e6),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        layer_windows=common.windows(hf, hf.get("sliding_window"), lambda layer: True),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", default=8),
            experts_per_token=hf.get("num_experts_per_tok", 2),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(hf["num_hidden_layers"])),
            normalize=True,
            activation=common.activation(hf, default="silu"),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    block = "model.layers.{layer}.block_sparse_moe"
    experts = expert_names(config, block=block, gate="w1", up="w3", down="w2")
    return common.sources_from(config, {**common.LLAMA_NAMES, **experts})
