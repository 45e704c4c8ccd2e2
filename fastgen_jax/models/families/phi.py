"""Phi-1, 1.5 and 2: parallel attention and MLP after one LayerNorm, part of each head rotated, biases everywhere."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("PhiForCausalLM",)
FEATURES = "Phi-1, 1.5, 2; norms on queries and keys; grouped heads"

_LAYER = "model.layers.{layer}."
NAMES = common.LLAMA_NAMES | {
    "final_norm": "model.final_layernorm",
    "layers.q_norm": f"{_LAYER}self_attn.q_layernorm",
    "layers.k_norm": f"{_LAYER}self_attn.k_layernorm",
    "layers.o": f"{_LAYER}self_attn.dense",
    "layers.up": f"{_LAYER}mlp.fc1",
    "layers.down": f"{_LAYER}mlp.fc2",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    sizes = common.sizes(hf)
    positions = rotary(hf, max_context_len=2048, head_dim=sizes["head_dim"], partial=0.5)
    common.refuse_unsupported(hf, {"rotary_dim": (positions["rope"].dim or sizes["head_dim"],)})  # a copy
    hf.ignore("rotary_dim")
    return ModelConfig(
        family="phi",
        **sizes,
        **positions,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        norm_bias=True,
        parallel_residual=True,
        shared_norm=True,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        head_bias=True,
        qkv_bias=True,
        o_bias=True,
        qk_norm="head" if hf.get("qk_layernorm", False) else None,
        qk_norm_bias=hf.get("qk_layernorm", False),
        activation=common.activation(hf, default="gelu_new"),
        mlp_gated=False,
        mlp_bias=True,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
