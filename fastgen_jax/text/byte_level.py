"""Byte-level BPE given as vocab.json and merges.txt, as GPT-2, OPT, GPT-NeoX and Qwen2 were first published.

The two files say nothing about how text is split into words: that is part of the tokenizer's class in transformers, which
tokenizer_config.json or config.json names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastgen_jax.checkpoint.huggingface import how_to_replace, read_json
from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.splits import SPLITS

if TYPE_CHECKING:
    import tokenizers

Family = Literal["GPT-2", "GPT-NeoX", "Qwen2", "Qwen3.5"]

_END = "<|endoftext|>"  # the token that all these classes use for those that are not set

# Classes of transformers 5.15 without "Fast"; older ones that it replaces by one of these are included.
_CLASSES: dict[str, Family] = {
    "GPT2Tokenizer": "GPT-2",
    "CodeGenTokenizer": "GPT-2",
    "OPTTokenizer": "GPT-2",
    "GPTNeoXTokenizer": "GPT-NeoX",
    "Qwen2Tokenizer": "Qwen2",
    "Qwen3_5Tokenizer": "Qwen3.5",
}
# Values of model_type in config.json, for directories that name no class, or only a general one.
_MODEL_TYPES: dict[str, Family] = {
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "codegen", "opt", "phi", "starcoder2", "jais2"), "GPT-2"),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe", "falcon_mamba", "mamba", "rwkv"), "GPT-NeoX"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "Qwen3.5"),
}


def family_of(folder: Path, settings: JsonFields) -> Family:
    """How the tokenizer of a directory splits text; ValueError if its class is unknown."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = [settings.get("tokenizer_class"), config.get("tokenizer_class")]
    classes = [name.removesuffix("Fast") for name in named if isinstance(name, str)]
    for name in classes:
        if name in _CLASSES:
            return _CLASSES[name]
    family = _MODEL_TYPES.get(str(config.get("model_type")))
    specific = [name for name in classes if name not in ("PreTrainedTokenizer", "TokenizersBackend")]
    if family is None or specific:
        what = f"names the class {specific[0]!r}" if specific else "does not name the class of its tokenizer"
        raise ValueError(
            f'{folder} has vocab.json and merges.txt, but {what}; set "tokenizer_class" in tokenizer_config.json to one of '
            f"{', '.join(_CLASSES)}, or add a tokenizer.json"
        )
    return family


def default_tokens(family: Family, settings: JsonFields, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """The named tokens that the settings leave open, if the vocabulary has the one of the class."""
    if backend.token_to_id(_END) is None:
        return {}
    names = ("unk_token", "eos_token", "pad_token" if family.startswith("Qwen") else "bos_token")
    return {name: _END for name in names if name not in settings}


def read_backend(
    folder: Path, family: Family, added: Mapping[int, tuple[str, Mapping[str, bool]]], *, prefix_space: bool
) -> tokenizers.Tokenizer:
    """The tokenizer, in which added tokens already have their ids; ValueError if a file is missing or broken."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for file, other in ((vocab, merges), (merges, vocab)):
        if not file.exists():
            raise ValueError(f"{file} does not exist; {other.name} requires it: download it, or a tokenizer.json")
    words = _read_vocab(vocab)
    for id, (text, _) in added.items():
        words.setdefault(text, id)
    try:
        backend = Tokenizer(models.BPE(words, _read_merges(merges)))
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{merges} does not match {vocab.name} ({error}); {how_to_replace(merges)}") from error
    if family == "GPT-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    elif family == "GPT-NeoX":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        backend.normalizer = normalizers.NFC()
        (pattern,) = SPLITS["qwen2" if family == "Qwen2" else "qwen35"]
        words_of_text = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words_of_text, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)]
        )
    return backend


def _read_vocab(file: Path) -> dict[str, int]:
    words = read_json(file)
    for text, id in words.items():
        if type(id) is not int or id < 0:
            raise ValueError(f"{file}: {text!r} has the id {id!r}, which is not a number of a token; download it again")
    if not words:
        raise ValueError(f"{file} has no tokens; download it again")
    return dict(words)


def _read_merges(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: a piece may contain other line separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}); download it again") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"{file}, line {number}: expected two pieces with a space between, got {line[:60]!r}; download it again"
            )
        merges.append((pair[0], pair[1]))
    return merges
