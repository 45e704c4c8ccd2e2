"""LFM2: short convolutions in most layers, attention with norms on queries and keys in the others."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.families.state_layers import split_layers
from fastgen_jax.models.state_config import ShortConv

ARCHITECTURES = ("Lfm2ForCausalLM",)
FEATURES = "short convolutions, with or without biases; every rotary scaling; tied or separate head"

LAYER = "model.layers.{layer}"
NAMES = common.LLAMA_NAMES | {
    "final_norm": "model.embedding_norm",
    "layers.attn_norm": f"{LAYER}.operator_norm",
    "layers.mlp_norm": f"{LAYER}.ffn_norm",
    "layers.q_norm": f"{LAYER}.self_attn.q_layernorm",
    "layers.k_norm": f"{LAYER}.self_attn.k_layernorm",
    "layers.o": f"{LAYER}.self_attn.out_proj",
    "layers.mix_in": f"{LAYER}.conv.in_proj",
    "layers.conv": f"{LAYER}.conv.conv",
    "layers.mix_out": f"{LAYER}.conv.out_proj",
    "layers.gate_up": (f"{LAYER}.feed_forward.w1", f"{LAYER}.feed_forward.w3"),
    "layers.down": f"{LAYER}.feed_forward.w2",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    return ModelConfig(family="lfm2", **common.sizes(hf, mlp_dim=_mlp_dim(hf)), **convolutions(hf))


def convolutions(hf: Fields) -> common.ModelFields:
    """What all LFM2 models have, as keyword arguments of `ModelConfig`."""
    count, width = hf["num_hidden_layers"], hf["hidden_size"]
    common.refuse_unsupported(
        hf,
        {"conv_dim": (width,), "conv_dim_out": (width,), "block_dim": (width,), "use_pos_enc": (True,)},
    )
    hf.ignore("conv_dim", "conv_dim_out", "block_dim", "use_pos_enc", "num_heads", "block_norm_eps", "theta")
    hf.ignore("conv_use_xavier_init", "block_use_xavier_init", "block_mlp_init_scale", "block_out_init_scale")
    with_attention = hf.get("full_attn_idxs") or range(count)
    types = hf.get("layer_types") or ["full_attention" if i in with_attention else "conv" for i in range(count)]
    attention, convolved = split_layers(hf, types, ("conv",))
    return {
        **rotary(hf, max_context_len=128_000, theta=1_000_000.0),
        "norm_eps": hf.get("norm_eps", 1e-5),
        "tie_embeddings": hf.first("tie_embedding", "tie_word_embeddings", default=True),
        "qk_norm": "head",
        "attention_layers": attention,
        "state": ShortConv(layers=convolved, width=hf.get("conv_L_cache", 3), bias=hf.get("conv_bias", False)),
    }


def _mlp_dim(hf: Fields) -> int:
    """The width of the MLP: two thirds of what the config says, rounded up, unless it is to be taken as it is."""
    common.refuse_unsupported(hf, {"block_use_swiglu": (True,)})
    hf.ignore("block_use_swiglu")
    size = hf.first("block_ff_dim", "intermediate_size", default=12_288)
    adjust, multiple = hf.get("block_auto_adjust_ff_dim", True), hf.get("block_multiple_of", 256)
    factor = hf.get("block_ffn_dim_multiplier", 1.0)
    if not adjust:
        return size
    size = int(2 * size / 3)
    return size if factor is None else -(-int(factor * size) // multiple) * multiple


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
