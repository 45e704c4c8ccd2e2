"""GPT-2: learned positions, LayerNorm, biases, matrices stored [in, out]."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import ModelFields, Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("GPT2LMHeadModel",)
FEATURES = "all sizes, DistilGPT-2; n_inner; unscaled attention, or scaled by layer"

_LAYER = "transformer.h.{layer}."
NAMES = {
    "embed": "transformer.wte",
    "position_embed": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}ln_1",
    "layers.mlp_norm": f"{_LAYER}ln_2",
    "layers.qkv": f"{_LAYER}attn.c_attn",
    "layers.o": f"{_LAYER}attn.c_proj",
    "layers.up": f"{_LAYER}mlp.c_fc",
    "layers.down": f"{_LAYER}mlp.c_proj",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"add_cross_attention": (False,)})
    # `reorder_and_upcast_attn` guards against overflow in half precision; our scores are in float32 anyway.
    hf.ignore("reorder_and_upcast_attn", "n_ctx")
    return ModelConfig(
        family="gpt2",
        **gpt2_like(hf, activation="gelu_new"),
        num_kv_heads=hf["n_head"],
        attention_scale_by_layer=hf.get("scale_attn_by_inverse_layer_idx", False),
    )


def gpt2_like(hf: Fields, *, activation: str) -> ModelFields:
    """What GPT-BigCode has in common with GPT-2, as keyword arguments of `ModelConfig`; `activation` is a default."""
    num_heads, embed_dim = hf["n_head"], hf["n_embd"]
    context = hf.get("n_positions", 1024)
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["n_layer"],
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "head_dim": embed_dim // num_heads,
        "mlp_dim": hf.get("n_inner") or 4 * embed_dim,
        "max_context_len": context,
        "norm": "layer",
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "norm_bias": True,
        "learned_positions": context,
        "rope": None,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "qkv_bias": True,
        "o_bias": True,
        "attention_scale": None if hf.get("scale_attn_weights", True) else 1.0,
        "activation": common.activation(hf, "activation_function", default=activation),
        "mlp_gated": False,
        "mlp_bias": True,
        **common.special_tokens(hf),
    }


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, conv1d=("layers.qkv", "layers.o", "layers.up", "layers.down"))
