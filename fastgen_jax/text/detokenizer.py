"""Incremental detokenization: the text of tokens as they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping

from fastgen_jax.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Returns the text of a growing sequence piece by piece, without decoding earlier tokens again.

    A character whose bytes span several tokens is held back until it is complete or known to be invalid. The pieces,
    `flush` included, join to what `tokenizer.decode` adds to the prompt's text for the same tokens, starting with a
    character that the prompt left unfinished.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Iterable[int] = (),
        skip_special_tokens: bool = True,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """`marks` maps ids of skipped special tokens to the text that replaces them."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.drops_leading_space
        self._marks = None
        self.push(prompt_ids)
        self._marks = marks

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these tokens complete; often empty, never part of a character."""
        if self._marks:
            return "".join(self._marks.get(id) or self._text((id,)) for id in ids)
        return self._text(ids)

    def _text(self, ids: Iterable[int]) -> str:
        data = b"".join(self._tokenizer.visible_bytes(id, skip_special_tokens=self._skip_special_tokens) for id in ids)
        return self._at_start(self._utf8.decode(data))

    def flush(self) -> str:
        """Returns the rest: U+FFFD for an incomplete character. Call it once, after the last token."""
        return self._at_start(self._utf8.decode(b"", final=True))

    def _at_start(self, text: str) -> str:
        if not text or not self._drops_space:
            return text
        self._drops_space = False
        return text.removeprefix(" ")
