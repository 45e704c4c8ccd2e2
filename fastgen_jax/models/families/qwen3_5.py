"""Qwen3.5: the layers of Qwen3-Next with an MLP. Multimodal checkpoints are read without their vision part."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.qwen3_next import LAYER, delta_net_model
from fastgen_jax.models.families.state_layers import queries_and_gates, state_names

ARCHITECTURES = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
FEATURES = "gated delta nets and gated attention; without images"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    hf.ignore("mlp_only_layers")  # concerns experts
    return ModelConfig(family="qwen3_5", **common.sizes(hf, head_dim=256), **delta_net_model(hf))


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(
        config,
        {**common.LLAMA_NAMES, **delta_net_names()},
        rearrange={"layers.qkv": queries_and_gates(config.num_heads, config.head_dim)},
    )


def delta_net_names() -> dict[str, str | tuple[str, str] | Source]:
    """The names of the weights of a delta net."""
    module = f"{LAYER}.linear_attn"
    return {
        **state_names(module),
        "layers.mix_in": (f"{module}.in_proj_qkv", f"{module}.in_proj_z"),
        "layers.mix_gates": (f"{module}.in_proj_b", f"{module}.in_proj_a"),
    }
