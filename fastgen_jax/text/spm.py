"""SentencePiece models: those on disk, those rebuilt from a GGUF vocabulary, and special tokens around both."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

_BPE = 2  # TrainerSpec.ModelType
_UNKNOWN, _UNUSED, _BYTE = 2, 5, 6  # SentencePiece.Type


def open_model(proto: bytes) -> Any:
    """A `SentencePieceProcessor` of a serialised model; ValueError if it is broken."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"SentencePiece refuses the model: {error}") from error


def build_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unknown_id: int,
    add_space_prefix: bool,
) -> bytes:
    """The serialised BPE model of a vocabulary; `types` are SentencePiece's own numbers, which GGUF shares.

    Written field by field because few of the message's fields matter. Source: sentencepiece_model.proto.
    """
    # A model has one unknown piece; converters also mark padding entries so, which never come out of a text.
    types = [_UNUSED if kind == _UNKNOWN and i != unknown_id else kind for i, kind in enumerate(types)]
    byte_fallback = _BYTE in types
    trainer = _varint(3, _BPE) + _varint(35, byte_fallback) + _varint(40, unknown_id)
    normalizer = _text(1, b"identity") + _varint(3, add_space_prefix) + _varint(4, 0) + _varint(5, 1)
    entries = (
        _text(1, _text(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    )
    return b"".join(entries) + _text(2, trainer) + _text(3, normalizer)


def without_space_prefix(proto: bytes) -> bytes:
    """The same model, but for the space that it puts before a text: protobuf lets a later field overwrite."""
    return proto + _text(3, _varint(3, 0))


class SentencePieceEncoder:
    """Encodes text between special tokens with SentencePiece, which knows only the text.

    With `prefix_every_part` each part gets SentencePiece's leading space, as the first Llama tokenizers did (llama.cpp
    and transformers' legacy=True); otherwise the part that starts the text alone.
    """

    def __init__(
        self,
        proto: bytes,
        *,
        specials: Mapping[str, int],
        prefix_every_part: bool = True,
        first: Sequence[int] = (),
        last: Sequence[int] = (),
    ) -> None:
        self.model = open_model(proto)
        self.inner = self.model if prefix_every_part else open_model(without_space_prefix(proto))
        self.specials = dict(specials)
        longest_first = sorted((text for text in specials if text), key=len, reverse=True)
        self.border = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self.first, self.last = list(first), list(last)

    def __call__(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        parts = self.border.split(text) if self.border else [text]
        for i, part in enumerate(parts):  # text, special, text, special, ..., text
            if i % 2:
                ids.append(self.specials[part])
            elif part:
                ids += (self.model if i == 0 else self.inner).encode(part)
        return [*self.first, *ids, *self.last] if add_special_tokens else ids


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(int(value))


def _text(field: int, data: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(data)) + data


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
