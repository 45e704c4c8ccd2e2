"""GPT-J: parallel attention and MLP after one LayerNorm, adjacent pairs of part of each head rotated, a bias in the head."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("GPTJForCausalLM",)
FEATURES = "GPT-J 6B, GPT4All-J, Dolly v1; n_inner"

_LAYER = "transformer.h.{layer}."
NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.attn_norm": f"{_LAYER}ln_1",
    "layers.qkv": tuple(f"{_LAYER}attn.{x}_proj" for x in "qkv"),
    "layers.o": f"{_LAYER}attn.out_proj",
    "layers.up": f"{_LAYER}mlp.fc_in",
    "layers.down": f"{_LAYER}mlp.fc_out",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"rotary": (True,), "scale_attn_weights": (True,)})
    hf.ignore("rotary", "scale_attn_weights", "n_ctx")
    num_heads, embed_dim = hf["n_head"], hf["n_embd"]
    return ModelConfig(
        family="gptj",
        vocab_size=hf["vocab_size"],
        num_layers=hf["n_layer"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=hf.get("n_inner") or 4 * embed_dim,
        max_context_len=hf.get("n_positions", 2048),
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        parallel_residual=True,
        shared_norm=True,
        rope=RopeConfig(dim=hf.get("rotary_dim", 64)),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        head_bias=True,
        activation=common.activation(hf, "activation_function", default="gelu_new"),
        mlp_gated=False,
        mlp_bias=True,
        **common.special_tokens(hf),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.adjacent_pairs_to_halves(config)})
