"""Regenerates `text.json`: token ids and rendered conversations by transformers, for `tests/text/test_transformers.py`.

    python tests/reference/make_text.py      # needs transformers 5.15 and jinja2

The vocabulary and the templates are small ones of our own, which use what published ones use.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from conversations import CONVERSATIONS, TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Grüße aus Köln! Ça va? 日本語 テキスト",
    "def f(x):\n    return x ** 2  # squares\n",
    "1234 5678 90",
    "don't won't I'll we've",
]
TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello  world ",
    "12345 don't  WON'T",
    "e\u0301 é 日本語 क्षि",
    "a\n\n b\r\n\tc",
    "x<s>y</s> z",
    "<|endoftext|>a <|endoftext|>",
    "a<mask> b",
    "hi <think> there<|im_end|>\n",
    "<new>x",
    "\u00a0a\u200b😀",
    "!a",
]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>"]


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """The words and the lines of merges of a byte-level BPE trained on the corpus, special pieces first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=PIECES, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 5, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


def tokenizer_json(words: dict[str, int], merges: list[str], *, post: str | None) -> str:
    """A tokenizer.json in the style of Qwen2 whose post-processor is of that kind."""
    backend = Tokenizer(models.BPE(words, [tuple(line.split(" ")) for line in merges]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<s>", special=False)])
    if post == "template":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    elif post == "bytes":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend.to_str()


def directories(words: dict[str, int], merges: list[str]) -> dict[str, dict[str, Any]]:
    """The files of each directory beside vocab.json and merges.txt; one with a tokenizer.json has neither."""
    size = len(words)
    added = {
        str(size): token("<|im_end|>"),
        str(size + 1): token("<think>", special=False),
        str(size + 2): token("<mask>", lstrip=True),
    }
    qwen = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<|endoftext|>"}
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    opt = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "unk_token": token("</s>"), "bos_token": token("</s>")}
    return {
        "gpt2, no settings": {"config.json": {"model_type": "gpt2"}},
        "gpt2": {"config.json": {"model_type": "gpt2"}, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        "gpt2, prefix space": {
            "config.json": {"model_type": "gpt2"},
            "tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
        },
        "opt": {
            "config.json": {"model_type": "opt"},
            "tokenizer_config.json": {**opt, "eos_token": token("</s>"), "add_prefix_space": False},
            "special_tokens_map.json": {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
        },
        "opt with both ends": {
            "config.json": {"model_type": "opt"},
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer",
                **ends,
                "add_bos_token": True,
                "add_eos_token": True,
            },
        },
        "neox": {
            "config.json": {"model_type": "gpt_neox"},
            "tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False},
        },
        "phi with added tokens": {
            "config.json": {"model_type": "phi"},
            "tokenizer_config.json": {"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": added},
        },
        "qwen2": {"config.json": {"model_type": "qwen2"}, "tokenizer_config.json": {**qwen, "added_tokens_decoder": added}},
        "qwen2 with added_tokens.json": {
            "config.json": {"model_type": "qwen2"},
            "tokenizer_config.json": qwen,
            "added_tokens.json": {"<|im_end|>": size, "<think>": size + 1},
        },
        "qwen3 without a class": {"config.json": {"model_type": "qwen3"}, "tokenizer_config.json": {"add_bos_token": False}},
        **{
            f"tokenizer.json, {kind}, {flag}": {
                "config.json": {"model_type": "llama"},
                "tokenizer.json": tokenizer_json(words, merges, post=post),
                "tokenizer_config.json": {**plain, **ends, **({flag: value} if flag else {})},
            }
            for kind, post in (("no post-processor", None), ("its own BOS", "template"), ("bytes", "bytes"))
            for flag, value in (("", None), ("add_bos_token", post is None), ("add_eos_token", True))
        },
        "tokenizer.json, further tokens": {
            "config.json": {"model_type": "llama"},
            "tokenizer.json": tokenizer_json(words, merges, post=None),
            "tokenizer_config.json": {
                **plain,
                "bos_token": "<new>",
                "eos_token": "</s>",
                "pad_token": "!",
                "added_tokens_decoder": {str(size): token("<|im_end|>"), str(size + 1): token("<think>", special=False)},
                "additional_special_tokens": ["<mask>"],
            },
        },
        "tokenizer.json, special_tokens_map.json": {
            "config.json": {"model_type": "llama"},
            "tokenizer.json": tokenizer_json(words, merges, post=None),
            "tokenizer_config.json": {**plain, "bos_token": "</s>", "eos_token": "<s>"},
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        },
    }


def write(folder: Path, files: dict[str, Any], words: dict[str, int], merges: list[str]) -> None:
    """Writes one of the directories."""
    if "tokenizer.json" not in files:
        (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def encoded(folder: Path) -> dict[str, Any]:
    """What transformers makes of the texts."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "ids": ids,
        "plain": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "visible": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        "whole": [tokenizer.decode(each) for each in ids],
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
    }


def rendered(folder: Path) -> list[dict[str, Any]]:
    """The conversations as transformers renders them with each template."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    found = []
    for name, (template, conversations) in TEMPLATES.items():
        for key in conversations:
            conversation = CONVERSATIONS[key]
            text = tokenizer.apply_chat_template(
                conversation["messages"],
                tools=conversation.get("tools"),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **conversation.get("extra", {}),
            )
            found.append({"template": name, "conversation": key, "text": text})
    return found


def main() -> None:
    """Writes the file beside this script."""
    words, merges = vocabulary()
    cases, chats = [], []
    for name, files in directories(words, merges).items():
        with tempfile.TemporaryDirectory() as path:
            write(Path(path), files, words, merges)
            cases.append({"name": name, "files": files, **encoded(Path(path))})
            chats = chats or rendered(Path(path))
    found = {"vocab": words, "merges": merges, "texts": TEXTS, "tokenizers": cases, "chats": chats}
    Path(__file__).with_name("text.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
