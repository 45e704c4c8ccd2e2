"""GLM-4-0414 (9B, 32B, Z1): GLM with norms both before and after attention and MLP."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, glm
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("Glm4ForCausalLM",)
FEATURES = "9B and 32B of April 2025, Z1; part of each head rotated; biases"

NAMES = glm.NAMES | {
    "layers.post_attn_norm": "model.layers.{layer}.post_self_attn_layernorm",
    "layers.post_mlp_norm": "model.layers.{layer}.post_mlp_layernorm",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(family="glm4", exceeds_float16=True, **glm.fields(hf), norm_placement="both")


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.adjacent_pairs_to_halves(config)})
