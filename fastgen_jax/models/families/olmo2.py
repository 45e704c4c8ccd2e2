"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP; query and key norms span all heads."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Olmo2ForCausalLM",)
FEATURES = "1B to 32B; grouped heads; biases"

NAMES = common.LLAMA_NAMES | {
    "layers.post_attn_norm": "model.layers.{layer}.post_attention_layernorm",
    "layers.post_mlp_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family="olmo2",
        **common.sizes(hf),
        **rotary(hf, max_context_len=2048),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        norm_placement="output",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="row",
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
