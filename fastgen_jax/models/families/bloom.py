"""BLOOM (arXiv:2211.05100): ALiBi, a norm on the embeddings, LayerNorm and biases throughout."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("BloomForCausalLM", "BloomModel")
FEATURES = "all sizes, BLOOMZ"

_LAYER = "transformer.h.{layer}."
NAMES = {
    "embed": "transformer.word_embeddings",
    "embed_norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}input_layernorm",
    "layers.mlp_norm": f"{_LAYER}post_attention_layernorm",
    "layers.qkv": f"{_LAYER}self_attention.query_key_value",
    "layers.o": f"{_LAYER}self_attention.dense",
    "layers.up": f"{_LAYER}mlp.dense_h_to_4h",
    "layers.down": f"{_LAYER}mlp.dense_4h_to_h",
}
_OF_TRAINING = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "offset_alibi",
    "skip_bias_add",
    "slow_but_exact",
)  # these affect how the original ran, not its results


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"apply_residual_connection_post_layernorm": (False,)})
    hf.ignore(*_OF_TRAINING)
    num_heads, embed_dim = hf.first("n_head", "num_attention_heads"), hf.first("hidden_size", "n_embed")
    return ModelConfig(
        family="bloom",
        vocab_size=hf["vocab_size"],
        num_layers=hf.first("n_layer", "num_hidden_layers"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=hf.get("n_inner") or 4 * embed_dim,
        max_context_len=hf.get("seq_length", 2048),
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        embed_norm=True,
        rope=None,
        alibi_slopes=common.alibi_slopes(num_heads),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=True,
        o_bias=True,
        activation="gelu_tanh",
        mlp_gated=False,
        mlp_bias=True,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.split_kv_groups(config)})
