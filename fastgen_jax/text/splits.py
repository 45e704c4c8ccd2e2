r"""Pre-tokenizers of byte-level BPE, which split text into words. `tokenizer.ggml.pre` of a GGUF file names the kind.

A kind is a list of regular expressions (Oniguruma's dialect), applied in turn: each splits the pieces left by the previous
one. Sources: the `pre_tokenizer` of the models' tokenizer.json, and OpenAI's tiktoken; where llama.cpp differs, its choice
is used, because GGUF files are written for it.
"""

from __future__ import annotations

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"


def _words(digits: str, letters: str = r"\p{L}", *, punctuation_end: str = r"[\r\n]*") -> str:
    """The pattern of GPT-4 and its descendants: letters with one character before them, groups of digits, the rest."""
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|\p{{N}}{digits}"
        rf"| ?[^\s{letters}\p{{N}}]+{punctuation_end}|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased_words(digits: str, after: str) -> str:
    """The pattern of GPT-4o: like `_words`, and an uppercase letter starts a word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{after}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{after}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# Cased letters in the Unicode version of DeepSeek's table: without lowercase Armenian, most of Georgian, later Latin
# extensions, and mathematical letters.
_OLD_CASED = (
    "[[\\p{Lu}\\p{Ll}\\p{Lt}]&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001df1e]]"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2 + r"|\s+",),
    "smollm": (r"\p{N}", _GPT2 + r"|\s+"),
    "llama-bpe": (_words("{1,3}"),),
    "qwen2": (_words(""),),
    "seed-coder": (_words("", punctuation_end=""),),
    "qwen35": (_words("", r"\p{L}\p{M}"),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{_OLD_CASED}+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "gpt-4o": (_cased_words("{1,3}", f"(?i:{_CONTRACTIONS})?"),),
    "tekken": (_cased_words("", ""),),
    "bloom": (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",),
    # llama.cpp's default, for files converted before the kind was recorded
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
SYNONYMS = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "lfm2": "llama-bpe",
    "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "chatglm-bpe": "llama-bpe",
    "glm4": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
    "megrez": "qwen2",
    "hunyuan": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
    "minerva-7b": "smollm",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "jais": "gpt-2",
    "trillion": "gpt-2",
    "gigachat": "gpt-2",
    "exaone4": "gpt-2",
    "llama4": "gpt-4o",
    "gpt3-finnish": "bloom",
    "poro-chat": "bloom",
}
ADDS_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken"})
"""Kinds that start with BOS if add_bos_token is absent."""
IGNORES_MERGES = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "glm4", "tekken"})
"""Kinds that use a word of the vocabulary as one token even if merges do not produce it."""
COMPOSES = frozenset({"qwen2", "deepseek-r1-qwen", "command-r"})
"""Kinds whose tokenizer.json first normalizes text to NFC; llama.cpp does not."""
