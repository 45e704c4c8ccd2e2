"""Granite 3 MoE: Granite's multipliers, and the experts of a layer in one tensor."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("GraniteMoeForCausalLM",)
FEATURES = "one tensor of experts per layer; multipliers; biases"


def multipliers(hf: Fields) -> common.ModelFields:
    """The constants by which Granite multiplies embeddings, logits, residuals and scores."""
    return {
        "embed_multiplier": hf.get("embedding_multiplier", 1.0),
        "logits_multiplier": 1.0 / hf.get("logits_scaling", 1.0),
        "residual_multiplier": hf.get("residual_multiplier", 1.0),
        "attention_scale": hf.get("attention_multiplier", 1.0),
    }


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="granitemoe",
        **common.sizes(hf),
        **rotary(hf, max_context_len=2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        **multipliers(hf),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", default=8),
            experts_per_token=hf.get("num_experts_per_tok", 2),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(hf["num_hidden_layers"])),
            scores="softmax_of_chosen",
            activation=common.activation(hf, default="silu"),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    block = "model.layers.{layer}.block_sparse_moe"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            "layers.router": f"{block}.router.layer",
            "layers.expert_gate_up": f"{block}.input_linear",
            "layers.expert_down": f"{block}.output_linear",
        },
    )
