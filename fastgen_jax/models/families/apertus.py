"""Apertus: Llama with a norm on each query and key head, and a plain MLP whose activation, xIELU, has learned parameters."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rope_from_hf, rotary

ARCHITECTURES = ("ApertusForCausalLM",)
FEATURES = "8B and 70B; xIELU or any other activation; norms on queries and keys; every rotary scaling; biases"

_LAYER = "model.layers.{layer}."
_XIELU = ((f"{_LAYER}mlp.act_fn.beta", 0.5), (f"{_LAYER}mlp.act_fn.eps", -1e-6))  # those of `layers.xielu`
_SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    supported = {"qk_norm": (True,), "post_norm": (False,), "mlp_bias": (False,)}
    common.refuse_unsupported(hf, supported)
    hf.ignore(*supported)
    bias = hf.get("attention_bias", False)
    positions = rotary(hf, max_context_len=65_536, theta=12e6)
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        scaled = {"rope_parameters": {"rope_theta": positions["rope"].theta, **_SCALED}}
        positions["rope"] = rope_from_hf(scaled, max_context_len=positions["max_context_len"])
    return ModelConfig(
        family="apertus",
        **common.sizes(hf),
        **positions,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        activation="xielu" if hf.get("hidden_act", "xielu") == "xielu" else common.activation(hf, default="silu"),
        mlp_gated=False,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(
        config,
        common.LLAMA_NAMES
        | {
            "layers.attn_norm": f"{_LAYER}attention_layernorm",
            "layers.mlp_norm": f"{_LAYER}feedforward_layernorm",
            "layers.up": f"{_LAYER}mlp.up_proj",
            "layers.xielu_above": Source((f"{_LAYER}mlp.act_fn.alpha_p",)),
            "layers.xielu_below": Source((f"{_LAYER}mlp.act_fn.alpha_n",), constants=_XIELU),
        },
    )
