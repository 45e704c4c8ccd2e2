"""Matchers for answers that begin with reasoning."""

from __future__ import annotations

import numpy as np

from fastgen_jax.text.grammar import GrammarMatcher, ReasoningLimits


class ReasoningMatcher(GrammarMatcher):
    """First the reasoning, which is free but limited, then a text that `after` constrains; None: a free text.

    The end of the sequence is not allowed in the reasoning before a constrained text.
    """

    def __init__(self, limits: ReasoningLimits, after: GrammarMatcher | None, *, eos_token_ids: tuple[int, ...]) -> None:
        self.error = None
        self.is_static = False
        self._limits = limits
        self._after = after
        self._eos_token_ids = eos_token_ids
        self._num_opened = 0
        self._is_first = True  # no token has come
        self._num_tokens = 0  # of the reasoning
        self._recent: tuple[int, ...] = ()
        self._forced: list[int] = []  # tokens that come next
        self._phase = "opening"
        if not limits.opening:
            self._begin()

    @property
    def is_complete(self) -> bool:
        """Whether the text follows the grammar and nothing more is allowed."""
        return self._phase == "after" and not self._forced and self._after is not None and self._after.is_complete

    def restarted(self) -> ReasoningMatcher:
        """Returns a matcher at the start of the same text."""
        after = self._after and self._after.restarted()
        return ReasoningMatcher(self._limits, after, eos_token_ids=self._eos_token_ids)

    def fill_mask(self, words: np.ndarray) -> None:
        """See `GrammarMatcher.fill_mask`."""
        if self._forced:
            _allow(words, self._forced[0])
        elif self._phase == "inside" or self._after is None:
            words[:] = -1
            if self._after is not None:
                for token_id in self._eos_token_ids:
                    _allow(words, token_id, False)
        else:
            self._after.fill_mask(words)
            if self._phase == "opening":
                for token_id in (self._limits.opening[0], *(self._limits.blanks if self._is_first else ())):
                    _allow(words, token_id)

    def advance(self, token_id: int) -> bool:
        """Consumes a token; returns whether the text is complete, or there is an `error`."""
        is_first, self._is_first = self._is_first, False
        if self._forced:
            self._forced.pop(0)
            if self._phase == "opening" and not self._forced:
                self._begin()
        elif self._phase == "inside":
            self._num_tokens += 1
            self._recent = (*self._recent, token_id)[-len(self._limits.closing) :]
            if self._recent == self._limits.closing:
                self._phase, self._forced = "after", [*self._limits.then]
            else:
                self._check_budget()
        elif self._phase == "opening" and token_id == self._limits.opening[self._num_opened]:
            self._num_opened += 1
            if self._after is not None:
                self._forced = [*self._limits.opening[self._num_opened :]]
            if self._num_opened == len(self._limits.opening):
                self._begin()
        elif not (is_first and self._phase == "opening" and token_id in self._limits.blanks):
            self._phase = "after"
            if self._after is not None:
                ended = self._after.advance(token_id)
                self.error = self._after.error
                return ended
        return False

    def _begin(self) -> None:
        self._phase = "inside"
        self._check_budget()

    def _check_budget(self) -> None:
        if self._limits.budget is not None and self._num_tokens >= self._limits.budget:
            self._phase, self._forced = "after", [*self._limits.forced]


def _allow(words: np.ndarray, token_id: int, allowed: bool = True) -> None:
    """Sets or clears the bit of a token in i32 words."""
    bit = np.uint32(1 << token_id % 32)
    unsigned = words.view(np.uint32)
    if allowed:
        unsigned[token_id // 32] |= bit
    else:
        unsigned[token_id // 32] &= ~bit
