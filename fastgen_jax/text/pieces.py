"""Converting a token's text in the vocabulary to the bytes that it represents."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Literal

from fastgen_jax.json_types import JsonFields

Scheme = Literal["byte-level", "metaspace"]
"""How a vocabulary represents bytes: GPT-2's alphabet of 256 printable characters, or SentencePiece's ▁ and <0x0A>."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_alphabet() -> Mapping[str, int]:
    """Maps the characters of byte-level BPE to the bytes that they represent.

    A printable byte is its Latin-1 character; the other 68 are numbered from U+0100. Source: GPT-2's encoder.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.cache
def _bytes_as_latin_1() -> Mapping[int, int]:
    """For `str.translate`: the alphabet to its bytes as Latin-1 characters, the rest of Latin-1 to a character outside."""
    return dict.fromkeys(range(256), 0x2581) | {ord(character): byte for character, byte in byte_alphabet().items()}


def piece_bytes(piece: str, scheme: Scheme) -> bytes:
    """Returns the bytes of one vocabulary entry."""
    if scheme == "metaspace":
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode("utf-8", "replace")
    try:
        return piece.translate(_bytes_as_latin_1()).encode("latin-1")
    except UnicodeEncodeError:  # not in the alphabet: an added token, which is plain text
        return piece.encode("utf-8", "replace")


def scheme_of_decoder(decoder: JsonFields | None) -> tuple[Scheme, bool]:
    """Returns the scheme of a tokenizer.json's `decoder`, and whether it drops one space at the start of the text.

    Raises ValueError for a decoder that does not map each token to bytes (WordPiece, CTC, ...).
    """
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte-level", False
    if kinds == ["Metaspace"]:
        _check_replacement(steps[0].get("replacement"))
        return "metaspace", steps[0].get("prepend_scheme", "always") != "never"
    if "Replace" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        strip = False
        for step in steps:
            if step["type"] == "Replace":
                _check_replacement(step.get("pattern", {}).get("String"))
            elif step["type"] == "Strip":
                if (step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0):
                    raise ValueError(f"tokenizer.json has the decoder step {step}; supported: Strip of a leading space")
                strip = True
        return "metaspace", strip
    raise ValueError(
        f"tokenizer.json has a decoder of {kinds or 'no'} steps, which is not supported; supported: "
        "ByteLevel, Metaspace, or Replace + ByteFallback + Fuse (+ Strip)"
    )


def _check_replacement(character: str | None) -> None:
    if character != "▁":
        raise ValueError(f"tokenizer.json writes spaces as {character!r}; supported: '▁' (U+2581)")
