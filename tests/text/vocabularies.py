"""Small tokenizers of every format, trained or written quickly."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from fastgen_jax.text import Tokenizer, load_tokenizer
from fastgen_jax.text.gguf import load_gguf
from fastgen_jax.text.pieces import byte_alphabet

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Grüße aus Köln! Ça va? 日本語 テキスト",
    "def f(x):\n    return x ** 2  # squares\n",
    "1234 5678 90",
    "don't won't I'll we've",
    "the the and and of of",
]
TRICKY = [
    "",
    " ",
    "  ",
    "Hello",
    " Hello",
    "Hello ",
    "a  b   c",
    "\n\nnew\n",
    "\t\tx",
    "1234567",
    "don't",
    "é",
    "e\u0301",
    "日本語",
    "한국어",
    "हिन्दी",
    "العربية",
    "😀",
    "👩‍👩‍👧‍👦🇩🇪",
    "\u200b\ufeff",
    "a\u00a0b",
    "\x00\x7f",
    "\ufffd",
    "\U0010ffff",
    "<s>",
    "</s>x",
    "▁under",
    "<0x41>",
    "ﬁ Ǆ",
    "½ Ⅷ ٣",
    "\r\n crlf \r",
    "x" * 300,
]
SPECIALS = ["<s>", "</s>", "<|user|>", "<|end|>"]


@functools.cache
def _byte_bpe() -> dict[str, Any]:
    """The JSON of a byte-level BPE tokenizer trained on the corpus, special tokens first."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=sorted(byte_alphabet()), show_progress=False
        ),
    )
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return json.loads(backend.to_str())


@functools.cache
def spm_model() -> bytes:
    """A SentencePiece BPE model with byte fallback, trained on the corpus."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=out,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    return out.getvalue()


def write_json(path: Path, **settings: Any) -> Path:
    """A directory with tokenizer.json and tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(_byte_bpe()))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | settings))
    return path


def write_spm(path: Path, **settings: Any) -> Path:
    """A directory with tokenizer.model and tokenizer_config.json, two tokens added after those of the model."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(spm_model())
    added = {"420": {"content": "<|user|>", "special": True}, "421": {"content": "<tool>", "special": False}}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added} | settings))
    return path


WORDS = [
    "th",
    "the",
    " t",
    " the",
    "in",
    "ing",
    "qu",
    "un",
    "dog",
    " d",
    " do",
    " dog",
    "\n\n",
    "ü".encode(),
    "日".encode(),
    "日".encode()[:2],
    "12",
    "123",
    "he",
    "ver",
    "er",
]


TEKKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def ranks() -> list[bytes]:
    """The pieces of a small tiktoken vocabulary in order of rank: all bytes, then a few words."""
    words = [word if isinstance(word, bytes) else word.encode() for word in WORDS]
    return [bytes([byte]) for byte in range(256)] + sorted(words, key=len)


def write_qwen(path: Path) -> Path:
    """A directory with ranks as Qwen v1 has them."""
    path.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(piece) + f" {rank}\n".encode() for rank, piece in enumerate(ranks()))
    (path / "qwen.tiktoken").write_bytes(b"".join(lines))
    return path


def write_tekken(path: Path) -> Path:
    """A directory with a tekken.json: 30 special tokens, then the ranks, of which the last does not count."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"pattern": TEKKEN_PATTERN, "default_vocab_size": 29 + len(ranks()), "default_num_special_tokens": 30}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(piece).decode()} for i, piece in enumerate(ranks())]
    (path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    return path


def metaspace_metadata() -> dict[str, Any]:
    """Metadata of a BPE over characters with byte fallback, as Gemma 4 has it."""
    letters = sorted(set("".join(CORPUS).replace(" ", "▁")) - {"\n"})
    words = ["th", "the", "▁the", "og", "▁d", "▁dog", "▁▁"]
    merges = ["t h", "th e", "▁ the", "o g", "▁ d", "▁d og", "▁ ▁"]
    texts = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words, "<think>"]
    types = [3, 3, 3, 2, *[6] * 256, *[1] * (len(letters) + len(words)), 4]
    fields = {
        "model": "gemma4",
        "tokens": texts,
        "token_type": types,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 3,
        "padding_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def gguf_metadata(kind: str, **extra: Any) -> dict[str, Any]:
    """Metadata as GGUF stores it: kind "llama" for SentencePiece, else a `tokenizer.ggml.pre` of byte-level BPE."""
    if kind == "llama":
        spm = sentencepiece.SentencePieceProcessor(model_proto=spm_model())
        size = spm.get_piece_size()
        types = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in range(size)]
        texts = [spm.id_to_piece(i) for i in range(size)]
        types[texts.index("<think>")] = 4
        fields = {
            "model": "llama",
            "tokens": texts,
            "scores": [spm.get_score(i) for i in range(size)],
            "token_type": types,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
    else:
        model = _byte_bpe()["model"]
        texts = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
        types = [3 if text in SPECIALS else 4 if text == "<think>" else 1 for text in texts]
        fields = {
            "model": "gpt2",
            "pre": kind,
            "tokens": texts,
            "token_type": types,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "merges": [" ".join(merge) for merge in model["merges"]],
        }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | extra


def all_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """One of every format."""
    return {
        "json": load_tokenizer(write_json(folder / "json")),
        "spm": load_tokenizer(write_spm(folder / "spm")),
        "gguf bpe": load_gguf(gguf_metadata("llama-bpe")),
        "gguf spm": load_gguf(gguf_metadata("llama")),
        "gguf metaspace": load_gguf(metaspace_metadata()),
        "tiktoken": load_tokenizer(write_qwen(folder / "tiktoken")),
        "tekken": load_tokenizer(write_tekken(folder / "tekken")),
    }
