"""GPT-NeoX and Pythia: parallel attention and MLP, each after a LayerNorm; part of each head rotated."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("GPTNeoXForCausalLM",)
FEATURES = "GPT-NeoX-20B, Pythia, Dolly v2; parallel or sequential; with or without attention biases"

_LAYER = "gpt_neox.layers.{layer}."
NAMES = {
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "layers.attn_norm": f"{_LAYER}input_layernorm",
    "layers.mlp_norm": f"{_LAYER}post_attention_layernorm",
    "layers.qkv": f"{_LAYER}attention.query_key_value",
    "layers.o": f"{_LAYER}attention.dense",
    "layers.up": f"{_LAYER}mlp.dense_h_to_4h",
    "layers.down": f"{_LAYER}mlp.dense_4h_to_h",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    sizes, bias = common.sizes(hf), hf.get("attention_bias", True)
    theta, part = float(hf.get("rotary_emb_base", 10_000)), hf.get("rotary_pct", 0.25)
    return ModelConfig(
        family="gpt_neox",
        **sizes,
        **rotary(hf, max_context_len=2048, head_dim=sizes["head_dim"], theta=theta, partial=part),
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        norm_bias=True,
        parallel_residual=hf.get("use_parallel_residual", True),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, default="gelu"),
        mlp_gated=False,
        mlp_bias=True,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.split_kv_groups(config)})
