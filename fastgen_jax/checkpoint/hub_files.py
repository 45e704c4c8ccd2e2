"""Which files of a repository on the hub a model consists of.

Repositories hold more than one copy of a model: other formats (`original/`, `consolidated.safetensors`, `.bin` beside
`.safetensors`, ONNX), adapters, and GGUF files of many quantizations.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from fastgen_jax.checkpoint.gguf_file import PART

# In the top folder. The JSON files are config, generation config, index, and those of the tokenizer.
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_BELOW = ("additional_chat_templates/*.jinja",)
_NOT_OF_THE_MODEL = ("adapter_*", "consolidated*", "training_args*", "optimizer*", "trainer_state*", "params.json")
WEIGHT_FILES = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")  # the first of these that there are


def files_of_model(names: Sequence[str], *, variant: str | None = None) -> list[str]:
    """The files to download, of all files of a repository.

    Config, tokenizer and one copy of the weights; of a repository of GGUF files the one (in all its parts) whose name
    contains `variant`, such as "Q4_K_M". ValueError if there is no model, or `variant` is missing, unknown or unclear.
    """
    top = [name for name in names if "/" not in name and is_of_model(name)]
    ggufs = [name for name in names if name.endswith(".gguf") and "mmproj" not in name]
    if variant is not None or (ggufs and "config.json" not in top):
        return _gguf_of(ggufs, variant)
    if "config.json" not in top:
        if any(name.rpartition("/")[2] == "adapter_config.json" for name in names):
            raise ValueError("it is a LoRA adapter, not a model; merge it into its base model first")
        raise ValueError("it has neither a config.json nor a GGUF file")
    for pattern in WEIGHT_FILES:
        if weights := [name for name in top if fnmatch.fnmatchcase(name, pattern)]:
            beside = [name for name in top if _matches(name, BESIDE_WEIGHTS)]
            return sorted({*weights, *beside, *(name for name in names if _matches(name, _BELOW))})
    if ggufs:
        return _gguf_of(ggufs, variant)
    raise ValueError("it has a config.json but no weights in .safetensors, pytorch_model.bin or GGUF files")


def is_of_model(name: str) -> bool:
    """False for the name of a file that a fine-tuning left, or that holds the weights in another layout or only a change."""
    return not _matches(name, _NOT_OF_THE_MODEL)


def _gguf_of(names: Sequence[str], variant: str | None) -> list[str]:
    parts: dict[str, list[str]] = {}
    for name in names:
        match = PART.fullmatch(name)
        parts.setdefault(match["name"] if match else name.removesuffix(".gguf"), []).append(name)
    if variant is None:
        fitting = list(parts)
    else:  # a whole word, in the name of the file or of its folder: Q4_K is not Q4_K_M
        word = re.compile(rf"(^|[^a-z0-9]){re.escape(variant.lower())}($|[^a-z0-9_])")
        fitting = [name for name in parts if word.search(name.lower())]
    if len(fitting) != 1:
        what = f"{len(fitting)} of its GGUF files are" if variant is not None else f"it has {len(fitting)} GGUF files"
        choice = ", ".join(sorted(parts)) or "none"
        reason = f"{what} called {variant!r}" if variant is not None else what
        raise ValueError(f"{reason}; append one of their names after a colon, as in :Q4_K_M ({choice})")
    return sorted(parts[fitting[0]])


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
