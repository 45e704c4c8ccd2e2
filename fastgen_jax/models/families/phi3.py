"""Phi-3, Phi-3.5 and Phi-4, mini included: Llama with fused projections, LongRoPE and sliding windows."""

from __future__ import annotations

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("Phi3ForCausalLM",)
FEATURES = "LongRoPE; sliding window; partial rotary and tied head (Phi-4-mini)"

NAMES = common.LLAMA_NAMES | {
    "layers.qkv": "model.layers.{layer}.self_attn.qkv_proj",
    "layers.gate_up": "model.layers.{layer}.mlp.gate_up_proj",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    # Settings of a block-sparse relative: 1 is what this model computes.
    common.refuse_unsupported(hf, {"full_attn_mod": (1,), "interpolate_factor": (1,)})
    hf.ignore("full_attn_mod", "interpolate_factor")
    sizes = common.sizes(hf)
    return ModelConfig(
        family="phi3",
        **sizes,
        **rotary(_longrope_by_its_name(hf), max_context_len=4096, head_dim=sizes["head_dim"]),
        layer_windows=common.windows(hf, hf.get("sliding_window"), lambda layer: True),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=common.activation(hf, default="silu"),
    )


def _longrope_by_its_name(hf: Fields) -> JsonFields:
    """Early Phi-3 releases call LongRoPE "yarn"; its two lists of factors identify it."""
    scaling = hf.get("rope_scaling")
    if scaling and scaling.get("type") == "yarn" and "long_factor" in scaling:
        return {name: hf[name] for name in hf} | {"rope_scaling": {**scaling, "type": "longrope"}}
    return hf


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
