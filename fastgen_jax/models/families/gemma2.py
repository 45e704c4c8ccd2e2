"""Gemma 2: norms before and after attention and MLP, soft caps, a sliding window in every other layer."""

from __future__ import annotations

import math

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Gemma2ForCausalLM",)
FEATURES = "2B, 9B and 27B"

_LAYER = "model.layers.{layer}."
NAMES = common.LLAMA_NAMES | {
    "layers.post_attn_norm": f"{_LAYER}post_attention_layernorm",
    "layers.mlp_norm": f"{_LAYER}pre_feedforward_layernorm",
    "layers.post_mlp_norm": f"{_LAYER}post_feedforward_layernorm",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    hidden = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    common.refuse_unsupported(hf, {"hidden_act": (hidden, None)})  # not read by any implementation, so it must agree
    hf.ignore("hidden_act")
    window = hf.get("sliding_window", 4096)
    common.refuse_unsupported(hf, {"sliding_window_size": (window, None)})  # an older name, written beside the newer
    hf.ignore("sliding_window_size")
    return ModelConfig(
        family="gemma2",
        exceeds_float16=True,
        **common.sizes(hf, head_dim=256, assumed={"num_key_value_heads": 4}),
        **rotary(hf, max_context_len=8192),
        layer_windows=common.windows(hf, window, lambda layer: layer % 2 == 0),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        norm_placement="both",
        embed_multiplier=math.sqrt(hf["hidden_size"]),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        logits_soft_cap=hf.get("final_logit_softcapping", 30.0),
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=hf.get("attn_logit_softcapping", 50.0),
        activation=common.activation(hf, "hidden_activation", default="gelu_pytorch_tanh"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
