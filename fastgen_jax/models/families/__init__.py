"""One small file per model family: which config fields it reads, and the names of its weights.

A family module has `ARCHITECTURES`, `FEATURES` (what is supported, in one line), `config_from_hf(hf) -> ModelConfig`
and `sources(config) -> dict[str, Source]`. See docs/adding-a-model.md.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from types import ModuleType

_NAMES = (
    "llama",
    "mistral",
    "opt",
    "falcon",
    "phi",
    "phi3",
    "qwen",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "gpt_bigcode",
    "mpt",
    "bloom",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "starcoder2",
    "stablelm",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "exaone4",
    "seed_oss",
    "arcee",
    "apertus",
    "nemotron",
    "baichuan",
    "internlm2",
    "internlm3",
    "minicpm",
    "hunyuan_v1_dense",
    "ernie4_5",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "granitemoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "ernie4_5_moe",
    "llama4",
    "glm4_moe_lite",
    "minimax_m2",
    "phimoe",
    "deepseek_v32",
    "qwen3_vl_moe",
    "mllama",
    "llava",
    "lfm2",
    "lfm2_moe",
    "granitemoehybrid",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "falcon_h1",
    "nemotron_h",
)

FAMILIES: dict[str, ModuleType] = {name: import_module(f"{__name__}.{name}") for name in _NAMES}


def family_of(architecture: str) -> ModuleType:
    """The family module of an architecture, as named in config.json; ValueError names the nearest supported one."""
    for family in FAMILIES.values():
        if architecture in family.ARCHITECTURES:
            return family
    supported = [name for family in FAMILIES.values() for name in family.ARCHITECTURES]
    nearest = difflib.get_close_matches(architecture, supported, n=1, cutoff=0.0)
    raise ValueError(
        f"architecture {architecture!r} is not supported; nearest supported: {nearest[0]} (all: {', '.join(supported)})"
    )
