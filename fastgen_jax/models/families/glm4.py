"""GLM-4-0414 (9B, 32B, Z1): GLM with norms behind attention and MLP as well as before them."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, glm
from fastgen_jax.models.families.common import Fields, Source

ARCHITECTURES = ("Glm4ForCausalLM",)
FEATURES = "9B and 32B of April 2025, Z1; part of each head turned; biases"

NAMES = glm.NAMES | {
    "layers.post_attn_norm": "model.layers.{layer}.post_self_attn_layernorm",
    "layers.post_mlp_norm": "model.layers.{layer}.post_mlp_layernorm",
}


@common.reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`."""
    return ModelConfig(family="glm4", **glm.fields(hf), norm_placement="both")


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where each weight of `param_specs` lies in the checkpoint."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.neighbours_apart(config)})
