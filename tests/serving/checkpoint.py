"""A tiny checkpoint with a tokenizer, as a directory that other processes can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.serving.tiny_server import CHARACTERS, SPECIALS, TEMPLATE
from tests.tiny import HOME


def write_checkpoint(path: Path) -> Path:
    """The tiny Llama of the reference values, with the tokenizer of `tiny_server`: one token per character."""
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(HOME / "default" / name, path / name)
    vocabulary = {text: i for i, text in enumerate((*SPECIALS, *CHARACTERS.replace(" ", "▁")))}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "pre_tokenizer": None,
        "normalizer": space,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, text in enumerate(SPECIALS)
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE})
    )
    return path
