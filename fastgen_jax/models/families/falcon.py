"""Falcon: 7B (multi-query, one shared norm), 40B and 180B (grouped, two norms), 11B (grouped, one norm), RW (ALiBi)."""

from __future__ import annotations

import math

import numpy as np

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("FalconForCausalLM", "RWForCausalLM")
FEATURES = "7B, 40B, 180B, 11B (Falcon 2) and RW; multi-query, grouped or multi-head; rotary or ALiBi"

_LAYER = "transformer.h.{layer}."
NAMES = {
    "embed": "transformer.word_embeddings",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}input_layernorm",
    "layers.mlp_norm": f"{_LAYER}post_attention_layernorm",
    "layers.qkv": f"{_LAYER}self_attention.query_key_value",
    "layers.o": f"{_LAYER}self_attention.dense",
    "layers.up": f"{_LAYER}mlp.dense_h_to_4h",
    "layers.down": f"{_LAYER}mlp.dense_4h_to_h",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    # The first release of the 40B does not say that it has the new architecture, but only it has this field.
    grouped = hf.get("new_decoder_architecture", hf.get("n_head_kv") is not None)
    parallel = hf.get("parallel_attn", True)
    num_norms = hf.first("num_ln_in_parallel_attn", default=2 if grouped else 1)
    common.refuse_unsupported(
        {"parallel_attn": parallel, "num_ln_in_parallel_attn": num_norms},
        {"parallel_attn": (True,), "num_ln_in_parallel_attn": (1, 2)} if grouped else {"num_ln_in_parallel_attn": (1,)},
    )
    num_heads, embed_dim = hf.first("num_attention_heads", "n_head"), hf.first("hidden_size", "n_embed")
    multi_query, kv_heads = hf.get("multi_query", True), hf.first("num_kv_heads", "n_head_kv", default=num_heads)
    head_dim, bias = embed_dim // num_heads, hf.get("bias", False)
    positions = rotary(hf, max_context_len=2048)
    if hf.get("alibi", False):
        # The slopes are scaled like the scores; training had them in bfloat16.
        slopes = np.asarray(common.alibi_slopes(num_heads), common.BFLOAT16).astype(float) / math.sqrt(head_dim)
        positions |= {"rope": None, "alibi_slopes": tuple(slopes.tolist())}
    return ModelConfig(
        family="falcon",
        vocab_size=hf["vocab_size"],
        num_layers=hf.first("num_hidden_layers", "n_layer"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=kv_heads if grouped else 1 if multi_query else num_heads,
        head_dim=head_dim,
        mlp_dim=hf.get("ffn_hidden_size") or 4 * embed_dim,
        **positions,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        parallel_residual=parallel,
        shared_norm=parallel and num_norms == 1,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, "activation", default="gelu"),
        mlp_gated=False,
        mlp_bias=bias,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    names = dict(NAMES)
    if config.parallel_residual and not config.shared_norm:
        names |= {"layers.attn_norm": f"{_LAYER}ln_attn", "layers.mlp_norm": f"{_LAYER}ln_mlp"}
    return common.sources_from(config, names, rearrange={"layers.qkv": common.split_kv_groups(config)})
