"""Tokens that a request may not sample, beside those that a grammar excludes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from fastgen_jax.text.tokenizer import Tokenizer

MASKS_PER_TASK = 4  # so many take about as long as handing a task to another thread, or longer


class Matcher(Protocol):
    """The tokens that may come next in one text: `GrammarMatcher` or `TokenFilter`."""

    @property
    def error(self) -> str | None:
        """Why the text cannot go on."""
        ...

    @property
    def is_static(self) -> bool:
        """Whether the same tokens are allowed at every position."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is allowed."""
        ...

    def restarted(self) -> Matcher:
        """Returns a matcher at the start of the text."""
        ...

    def fill_mask(self, words: np.ndarray) -> None:
        """Sets in `words` i32[ceil(V / 32)] the bit of each token that may come next."""
        ...

    def advance(self, token_id: int) -> bool:
        """Consumes a token; returns whether the text is complete, or there is an error."""
        ...


class TokenFilter:
    """Allows only some tokens, and nowhere the last token of a banned sequence after the others.

    `inner` restricts the tokens further. Source of the semantics: vLLM's `allowed_token_ids` and `bad_words`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        allowed: Sequence[int] | None,
        banned: Sequence[tuple[int, ...]],
        inner: Matcher | None = None,
    ) -> None:
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[: vocab_size if allowed is None else 0] = 1
        bits[list(allowed or ())] = 1
        bits[[sequence[0] for sequence in banned if len(sequence) == 1]] = 0
        self._base = np.packbits(bits, bitorder="little").view(np.int32)
        self._sequences = [sequence for sequence in banned if len(sequence) > 1]
        self._longest = max(map(len, self._sequences), default=1)
        self._inner = inner
        self._output: list[int] = []  # the end of the text, as far as a sequence may reach back

    @property
    def error(self) -> str | None:
        """That of the inner matcher."""
        return self._inner.error if self._inner is not None else None

    @property
    def is_static(self) -> bool:
        """Whether the same tokens are allowed at every position."""
        return self._inner is None and not self._sequences

    @property
    def is_complete(self) -> bool:
        """Whether the inner matcher is."""
        return self._inner is not None and self._inner.is_complete

    def with_inner(self, inner: Matcher | None) -> TokenFilter:
        """Returns this filter at the start of a text that `inner` restricts further."""
        copy = object.__new__(TokenFilter)
        copy.__dict__ |= self.__dict__ | {"_inner": inner, "_output": []}
        return copy

    def restarted(self) -> TokenFilter:
        """Returns a filter at the start of the text."""
        return self.with_inner(self._inner.restarted() if self._inner is not None else None)

    def fill_mask(self, words: np.ndarray) -> None:
        """Sets in `words` the bit of each token that may come next; all bits if there is none."""
        if self._inner is None:
            words[:] = -1
        else:
            self._inner.fill_mask(words)
        words &= self._base
        for sequence in self._sequences:
            before = len(sequence) - 1
            if tuple(self._output[-before:]) == sequence[:-1]:
                word, bit = divmod(sequence[-1], 32)
                words.view(np.uint32)[word] &= ~np.uint32(1 << bit)

    def advance(self, token_id: int) -> bool:
        """Consumes a token; returns whether the inner matcher is complete, or has an error."""
        if self._sequences:
            self._output = [*self._output, token_id][-self._longest :]
        return self._inner is not None and self._inner.advance(token_id)


def spellings(words: Iterable[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Returns the tokens of each word within a word and, if that is another sequence, at its start, after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids:
                found[tuple(ids)] = None
    return list(found)


def fill_masks(matchers: Sequence[Matcher], masks: np.ndarray) -> None:
    """Sets in row i of `masks` i32[n, ceil(V / 32)] the bit of each token that `matchers[i]` allows next.

    llguidance computes without Python's lock, so that with more than two processors several threads share the rows.
    """
    pool = _pool()
    rows = list(zip(matchers, masks, strict=True))
    tasks = [rows[start : start + MASKS_PER_TASK] for start in range(0, len(rows), MASKS_PER_TASK)]
    if pool is None or len(tasks) < 2:
        _fill(rows)
    else:
        for _ in pool.map(_fill, tasks):
            pass


def _fill(rows: Iterable[tuple[Matcher, np.ndarray]]) -> None:
    for matcher, words in rows:
        matcher.fill_mask(words)


@functools.cache
def _pool() -> ThreadPoolExecutor | None:
    workers = min(8, len(os.sched_getaffinity(0)) // 2)
    return ThreadPoolExecutor(workers, thread_name_prefix="fastgen-masks") if workers > 1 else None
