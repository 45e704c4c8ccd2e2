"""SentencePiece models, from disk or rebuilt from a GGUF vocabulary, and special tokens around both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sentencepiece


def open_model(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    """Returns the processor of a serialized model; ValueError if it is broken."""
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
    """Returns a serialized BPE model with this vocabulary; `types` are SentencePiece's own numbers, which GGUF shares."""
    schema = _schema()
    piece_type, trainer_spec = schema.ModelProto.SentencePiece, schema.TrainerSpec
    # A model has exactly one unknown piece; converters also mark padding entries as unknown, which no text produces.
    types = [piece_type.UNUSED if kind == piece_type.UNKNOWN and i != unknown_id else kind for i, kind in enumerate(types)]
    return schema.ModelProto(
        pieces=[
            piece_type(piece=piece, score=score, type=kind) for piece, score, kind in zip(pieces, scores, types, strict=True)
        ],
        trainer_spec=trainer_spec(model_type=trainer_spec.BPE, byte_fallback=piece_type.BYTE in types, unk_id=unknown_id),
        normalizer_spec=schema.NormalizerSpec(
            name="identity",
            add_dummy_prefix=add_space_prefix,
            remove_extra_whitespaces=False,
            escape_whitespaces=True,
        ),
    ).SerializeToString()


def without_space_prefix(proto: bytes) -> bytes:
    """Returns the same model without the space it adds before a text.

    Appending works because concatenated protobuf messages merge: the last value of a field wins.
    """
    schema = _schema()
    return proto + schema.ModelProto(normalizer_spec=schema.NormalizerSpec(add_dummy_prefix=False)).SerializeToString()


class SentencePieceEncoder:
    """Encodes the text between special tokens with SentencePiece, which does not handle special tokens itself.

    With `prefix_every_part` every part gets SentencePiece's leading space, as in the first Llama tokenizers (llama.cpp and
    transformers' legacy=True); otherwise only the start of the text does.
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


def _schema() -> Any:
    """SentencePiece's protobuf module. Any, because it creates its classes when it is imported."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2
