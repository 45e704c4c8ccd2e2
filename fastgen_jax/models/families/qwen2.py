"""Qwen 1.5, 2 and 2.5: Llama with biases on queries, keys and values, and sliding windows in the upper layers.

Qwen2-VL and Qwen2.5-VL read images. MiMo 7B is a Qwen2 with another name.
"""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = (
    "Qwen2ForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "MiMoForCausalLM",
)
FEATURES = "window from max_window_layers on; YaRN; tied head; Qwen2-VL and 2.5-VL with images; MiMo 7B"


def window_layers(hf: Fields) -> tuple[int | None, ...]:
    """The windows of Qwen2 and Qwen3: enabled by a flag, from layer max_window_layers on."""
    size, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    return common.windows(hf, size if hf.get("use_sliding_window", False) else None, lambda layer: layer >= first)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    settings = rotary(hf, max_context_len=32_768)
    if chunks := hf.get("dual_chunk_attention_config"):  # it changes nothing within the first chunk
        settings["max_context_len"] = min(settings["max_context_len"], chunks["chunk_size"])
    hf.ignore("num_nextn_predict_layers")  # multi-token prediction, which is not used
    hf.ignore("attention_bias")  # not read by transformers either: queries, keys and values always have biases
    return ModelConfig(
        family="qwen2",
        **common.sizes(hf),
        **settings,
        layer_windows=window_layers(hf),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=True,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, common.LLAMA_NAMES)
