"""One small file a family: which config fields it reads, and what its weights are called.

A family module has `ARCHITECTURES`, `config_from_hf(hf) -> ModelConfig` and `sources(config) -> dict[str, Source]`.
"""

from __future__ import annotations

import difflib
from types import ModuleType

from fastgen_jax.models.families import gpt_oss, granitemoe, llama, mixtral, olmoe, qwen2_moe, qwen3_moe

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss, "olmoe": olmoe,
    "granitemoe": granitemoe,
}


def family_of(architecture: str) -> ModuleType:
    """The family module of an architecture name as in config.json; ValueError names the nearest supported one."""
    for family in FAMILIES.values():
        if architecture in family.ARCHITECTURES:
            return family
    supported = [name for family in FAMILIES.values() for name in family.ARCHITECTURES]
    nearest = difflib.get_close_matches(architecture, supported, n=1, cutoff=0.0)
    raise ValueError(
        f"architecture {architecture!r} is not supported; nearest supported: {nearest[0]} "
        f"(all: {', '.join(supported)})"
    )
