"""Cache groups: how many KV blocks a sequence holds if some layers attend only to a sliding window.

All groups take their blocks from one pool, and each has a block table of its own. Those of a sequence cover the same
positions; a windowed group has freed the blocks at the beginning, which no later query can see:

    full        [ 7 | 2 | 9 | 4 | 1 | 5 ]
    window      [ - | - | - | 8 | 3 | 6 ]
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockGroups:
    """The cache groups of a model, and the sizes that determine how many blocks a sequence holds in each."""

    windows: tuple[int | None, ...]
    """One for each group, in tokens: a query at position p sees those after p - window; None: all up to p."""
    block_size: int
    token_budget: int
    """Tokens of the longest chunk. Its keys are written before its queries are computed, also beyond the window."""

    @property
    def num_groups(self) -> int:
        """How many blocks hold the keys and values of a position in all layers."""
        return len(self.windows)

    @property
    def is_windowed(self) -> bool:
        """Whether any group frees blocks while a sequence runs."""
        return any(window is not None for window in self.windows)

    def first_block(self, window: int | None, num_computed: int) -> int:
        """Index of the first block that is kept with `num_computed` positions computed.

        A query after the last full block, where a prompt that continues the sequence begins, can see it.
        """
        size = self.block_size
        return 0 if window is None else max(0, num_computed // size * size - window + 1) // size

    def blocks_held(self, num_tokens: int) -> int:
        """The most blocks that a sequence holds after chunks of one token, up to `num_tokens` tokens."""
        return self._blocks(num_tokens, chunk=1)

    def blocks_needed(self, num_tokens: int) -> int:
        """The most blocks that a sequence holds at any time until it has `num_tokens` tokens, whatever its chunks are."""
        return self._blocks(num_tokens, chunk=self.token_budget)

    def new_blocks(self, num_new: int, cached: tuple[list[int], ...]) -> int:
        """The most blocks that a sequence takes for `num_new` blocks of positions after those in `cached` (by group)."""
        if not self.is_windowed:
            return num_new * self.num_groups
        held = map(len, cached or ((),) * self.num_groups)
        return sum(
            min(num_new, self.blocks_spanned(w, self.token_budget) - n) for w, n in zip(self.windows, held, strict=True)
        )

    def longest(self, num_blocks: int, limit: int) -> int:
        """Tokens of the longest sequence, at most `limit`, that `num_blocks` blocks can hold."""
        if self.blocks_needed(limit) <= num_blocks:
            return limit
        most = -(-limit // self.block_size)
        fitting = bisect_right(range(most), num_blocks, key=lambda count: self.blocks_needed(count * self.block_size))
        return (fitting - 1) * self.block_size

    def sequences(self, num_blocks: int, num_tokens: int) -> int:
        """How many sequences of `num_tokens` tokens `num_blocks` blocks hold together, one of them still in its prompt."""
        spare = num_blocks - self.blocks_needed(num_tokens)
        return 0 if spare < 0 else 1 + spare // self.blocks_held(num_tokens)

    def capacity(self, num_blocks: int, limit: int) -> int:
        """Tokens that `num_blocks` blocks hold: in sequences of `limit` tokens, and of the longest if not even one fits."""
        if not self.is_windowed:
            return num_blocks // self.num_groups * self.block_size
        return self.sequences(num_blocks, limit) * limit or self.longest(num_blocks, limit)

    def _blocks(self, num_tokens: int, *, chunk: int) -> int:
        whole = -(-num_tokens // self.block_size)
        return sum(min(whole, self.blocks_spanned(window, chunk)) for window in self.windows)

    def blocks_spanned(self, window: int | None, chunk: int) -> int:
        """The most blocks that are kept for a chunk of `chunk` tokens, with its own; without a window, no limit."""
        size = self.block_size
        return 2**31 if window is None else (window + size - 2) // size + (chunk + size - 2) // size + 1
