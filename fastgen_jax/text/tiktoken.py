"""Vocabularies in the format of OpenAI's tiktoken: bytes and their ranks, without merges.

Three files are supported: `*.tiktoken` of Qwen v1, `tokenizer.model` of Meta's Llama 3 releases, and Mistral's
`tekken.json`. The first two do not contain their special tokens, which are part of the models' code, so they are listed
here.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen_jax.text.mistral import FORMATS, conversation_template
from fastgen_jax.text.pieces import byte_alphabet
from fastgen_jax.text.splits import SPLITS

if TYPE_CHECKING:
    import tokenizers

_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_LLAMA3_RANKS = 128_000
_LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
_TEKKEN_SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)


@dataclass(frozen=True, kw_only=True)
class TiktokenVocabulary:
    """A vocabulary from one of the files, with its special tokens and splitting rule."""

    kind: str
    pieces: Sequence[bytes]  # by id; special tokens have their text
    special_ids: range
    pattern: str  # splits text into words
    composes: bool  # whether text is normalized to NFC first
    bos: str | None
    eos: Sequence[str]
    conversations: str | None = None  # a chat template, if the file determines one

    @property
    def specials(self) -> Mapping[str, int]:
        """Ids of special tokens by their text."""
        return {self.pieces[id].decode(): id for id in self.special_ids}


def find_tiktoken(folder: Path) -> Path | None:
    """Returns the file in a checkpoint directory that this module supports; None if there is none."""
    for file in (*sorted(folder.glob("*.tiktoken")), folder / "tekken.json"):
        if file.exists():
            return file
    file = folder / "tokenizer.model"  # Meta's file has the same name as SentencePiece's
    return file if file.exists() and _is_ranks(file) else None


def read_tiktoken(file: Path) -> TiktokenVocabulary:
    """Returns the vocabulary of a file; ValueError if it is broken or unknown."""
    if file.name == "tekken.json":
        return _read_tekken(file)
    ranks = _read_ranks(file)
    size = len(ranks)
    if file.suffix == ".tiktoken":
        return TiktokenVocabulary(
            kind="tiktoken (Qwen)",
            pieces=[*ranks, *(text.encode() for text in _QWEN_SPECIALS)],
            special_ids=range(size, size + len(_QWEN_SPECIALS)),
            pattern=SPLITS["qwen2"][0],
            composes=True,
            bos=None,
            eos=("<|endoftext|>", "<|im_end|>"),
        )
    if size != _LLAMA3_RANKS:
        raise ValueError(
            f"{file} has {size:,} ranks; only the special tokens of Llama 3 ({_LLAMA3_RANKS:,} ranks) are known; "
            "use a checkpoint with a tokenizer.json"
        )
    return TiktokenVocabulary(
        kind="tiktoken (Llama 3)",
        pieces=[*ranks, *(text.encode() for text in _LLAMA3_SPECIALS)],
        special_ids=range(size, size + len(_LLAMA3_SPECIALS)),
        pattern=SPLITS["llama-bpe"][0],
        composes=False,
        bos="<|begin_of_text|>",
        eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    )


def encoder_backend(vocabulary: TiktokenVocabulary) -> tokenizers.Tokenizer:
    """Returns a tokenizer that encodes as tiktoken does.

    tiktoken merges the neighbors whose union has the lowest rank. The merges are therefore all ways to split a token into
    two others, in order of rank.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    ranked = {piece: id for id, piece in enumerate(vocabulary.pieces) if id not in vocabulary.special_ids}
    encoded = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranked}
    merges = []
    for piece in ranked:  # in order of rank
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ranked and piece[i:] in ranked]
        cuts.sort(key=lambda cut: (ranked[cut[0]], ranked[cut[1]]))
        merges += [(encoded[left], encoded[right]) for left, right in cuts]
    # A special token that has an entry keeps its id.
    words = {encoded[piece]: id for piece, id in ranked.items()} | dict(vocabulary.specials)
    backend = Tokenizer(models.BPE(words, merges, ignore_merges=True))
    if vocabulary.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in vocabulary.specials])
    return backend


def _is_ranks(file: Path) -> bool:
    with file.open("rb") as stream:
        first = stream.readline(200)
    return len(first.split()) == 2 and first.split()[1].isdigit()


def _read_ranks(file: Path) -> list[bytes]:
    """Returns the pieces in order of rank; the ranks must be 0, 1, 2, ... without gaps."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            if line:
                piece, rank = line.split()
                found[int(rank)] = base64.b64decode(piece, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{file}, line {number}: expected a piece in base64 and its rank, got {line[:60]!r}; download it again"
            ) from error
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"{file} has gaps in its ranks, or none at all; download it again")
    return [found[rank] for rank in range(len(found))]


def _read_tekken(file: Path) -> TiktokenVocabulary:
    try:
        content = json.loads(file.read_bytes())
        config = content["config"]
        num_special = config["default_num_special_tokens"]
        pieces = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"]]
        listed = sorted(content.get("special_tokens") or (), key=lambda entry: entry["rank"])
        given = [entry["token_str"] for entry in listed] or list(_TEKKEN_SPECIALS)
        size, pattern = config["default_vocab_size"], config["pattern"]
        version = config.get("version")
        effort = ((content.get("model_settings_builder") or {}).get("reasoning_effort") or {}).get("default")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"{file} is broken ({error!r}); download it again") from error
    specials = given + [f"<SPECIAL_{i}>" for i in range(len(given), num_special)]
    return TiktokenVocabulary(
        kind="tekken",
        pieces=[*(text.encode() for text in specials), *pieces[: size - num_special]],
        special_ids=range(num_special),
        pattern=pattern,
        composes=False,
        bos="<s>",
        eos=("</s>",),
        conversations=conversation_template(version, reasoning_effort=effort) if version in FORMATS else None,
    )
