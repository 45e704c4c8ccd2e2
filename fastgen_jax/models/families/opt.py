"""OPT (arXiv:2205.01068): learned positions, LayerNorm and biases; the 350m has its norms after the residual sum."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("OPTForCausalLM",)
FEATURES = "all sizes, 350m included (post-norm, projected embedding); without biases; without final norm"

_LAYER = "model.decoder.layers.{layer}."
NAMES = {
    "embed": "model.decoder.embed_tokens",
    "position_embed": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}self_attn_layer_norm",
    "layers.qkv": tuple(f"{_LAYER}self_attn.{x}_proj" for x in "qkv"),
    "layers.o": f"{_LAYER}self_attn.out_proj",
    "layers.mlp_norm": f"{_LAYER}final_layer_norm",
    "layers.up": f"{_LAYER}fc1",
    "layers.down": f"{_LAYER}fc2",
}
_POSITION_OFFSET = 2  # the first rows of the table are for padding


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    num_heads, embed_dim = hf["num_attention_heads"], hf["hidden_size"]
    pre_norm = hf.get("do_layer_norm_before", True)
    proj_dim = hf.get("word_embed_proj_dim") or embed_dim
    bias, affine = hf.get("enable_bias", True), hf.get("layer_norm_elementwise_affine", True)
    context = hf.get("max_position_embeddings", 2048)
    return ModelConfig(
        family="opt",
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=hf["ffn_dim"],
        max_context_len=context,
        norm="layer",
        norm_scale=affine,
        norm_bias=affine,
        norm_placement="input" if pre_norm else "residual",
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        embed_proj_dim=None if proj_dim == embed_dim else proj_dim,
        learned_positions=context + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        rope=None,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        activation=common.activation(hf, "activation_function", default="relu"),
        mlp_gated=False,
        mlp_bias=bias,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
