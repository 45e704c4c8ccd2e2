"""LLaVA and other multimodal models around a text model of one of several families, read without their vision part."""

from __future__ import annotations

from types import ModuleType

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import cohere2, gpt_oss, llama, mistral, qwen2, qwen3, qwen3_moe
from fastgen_jax.models.families.common import Source

ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)
FEATURES = "text models of Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Command R7B and gpt-oss, without images"

# By `text_config.model_type`.
_TEXT_MODELS: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "cohere2": cohere2,
    "gpt_oss": gpt_oss,
}
# Sizes that the published text_configs leave out.
_ASSUMED = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}


def config_from_hf(hf: JsonFields, *, strict: bool = False) -> ModelConfig:
    """The config of the text model, which is one of its own family."""
    text = hf.get("text_config") or {}
    kind = text.get("model_type") or "llama"
    if kind not in _TEXT_MODELS:
        raise ValueError(
            f"config.json has text_config.model_type={kind!r}, which is not supported; supported: {', '.join(_TEXT_MODELS)}"
        )
    return _TEXT_MODELS[kind].config_from_hf({**hf, "text_config": _ASSUMED.get(kind, {}) | text}, strict=strict)


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return _TEXT_MODELS[config.family].sources(config)
