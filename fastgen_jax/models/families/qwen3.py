"""Qwen3: Llama with a norm on each query and key head. Qwen3-VL reads images."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.qwen2 import window_layers
from fastgen_jax.models.families.rope import for_qwen3_vl, rotary

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration")
FEATURES = "norms on queries and keys; window from max_window_layers on; biases; YaRN; tied head; Qwen3-VL with images"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    bias = hf.get("attention_bias", False)
    settings = rotary(hf, max_context_len=32_768)
    if hf.get("architectures") == ["Qwen3VLForConditionalGeneration"]:
        settings["rope"] = for_qwen3_vl(settings["rope"])
    return ModelConfig(
        family="qwen3",
        **common.sizes(hf, head_dim=128),
        **settings,
        layer_windows=window_layers(hf),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
