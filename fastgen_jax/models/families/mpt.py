"""MPT: ALiBi, LayerNorms without biases, clipped queries, keys and values, no biases anywhere."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, is_harmless, reads_every_field

ARCHITECTURES = ("MptForCausalLM", "MPTForCausalLM")
FEATURES = "MPT-7B, MPT-30B and their variants; clipping of q, k and v; softmax_scale"

_LAYER = "transformer.blocks.{layer}."
NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.norm_f",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}norm_1",
    "layers.mlp_norm": f"{_LAYER}norm_2",
    "layers.qkv": f"{_LAYER}attn.Wqkv",
    "layers.o": f"{_LAYER}attn.out_proj",
    "layers.up": f"{_LAYER}ffn.up_proj",
    "layers.down": f"{_LAYER}ffn.down_proj",
}
_SUPPORTED = {
    "expansion_ratio": (4,),
    "no_bias": (True,),
    "logit_scale": (None,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
}
_SUPPORTED_IN_ATTENTION = {
    "attn_type": ("multihead_attention",),
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "prefix_lm": (False,),
    "qk_ln": (False,),
}
# How it runs and is trained; ALiBi replaces the learned positions; sequence ids are for packed training examples.
_OF_ITS_CODE = ("learned_pos_emb", "init_device", "init_config", "embedding_fraction", "tokenizer_name", "verbose")
_OF_ATTENTION_CODE = ("attn_impl", "attn_pdrop", "attn_uses_sequence_id", "model_type")


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    attention = hf.get("attn_config") or {}
    common.refuse_unsupported(hf, _SUPPORTED)
    common.refuse_unsupported(attention, _SUPPORTED_IN_ATTENTION)
    known = ("clip_qkv", "softmax_scale", *_SUPPORTED_IN_ATTENTION, *_OF_ATTENTION_CODE)
    if unknown := [name for name, value in attention.items() if name not in known and not is_harmless(name, value)]:
        raise ValueError(f"attn_config has the unknown fields {unknown}; remove them if they do not matter")
    hf.ignore(*_SUPPORTED, *_OF_ITS_CODE)
    num_heads, embed_dim = hf["n_heads"], hf["d_model"]
    return ModelConfig(
        family="mpt",
        vocab_size=hf["vocab_size"],
        num_layers=hf["n_layers"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=4 * embed_dim,
        max_context_len=hf.get("max_seq_len", 2048),
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        rope=None,
        alibi_slopes=common.alibi_slopes(num_heads),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        clip_qkv=attention.get("clip_qkv") or None,
        attention_scale=attention.get("softmax_scale"),
        activation="gelu",
        mlp_gated=False,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
