"""One step as the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastgen_jax.scheduling.sequence import Sequence


class Chunk(NamedTuple):
    """The tokens at positions `[start, start + length)` of one sequence, computed in one step.

    Logits are wanted for the last `num_sample_rows` positions. `samples`: the very last of them yields a new
    token.
    """

    sequence: Sequence
    start: int
    length: int
    num_sample_rows: int
    samples: bool


class Step(NamedTuple):
    """One step to dispatch.

    `sampled` are the sequences whose chunk samples a new token, in chunk order. `block_updates` holds exactly
    what changed in the block tables: `(slot, first index, block ids)`, the whole table for a sequence in
    `admitted`, which got its slot in this step. Sequences in `preempted` lost theirs; it may be in use again
    in this very step.
    """

    chunks: list[Chunk]
    sampled: list[Sequence]
    block_updates: list[tuple[int, int, list[int]]]
    admitted: list[Sequence]
    preempted: list[Sequence]
    num_tokens: int
    num_sample_rows: int

    @property
    def num_sequences(self) -> int:
        """Sequences with a chunk in this step."""
        return len(self.chunks)


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start. A prefix hit is a token whose KV was found instead of computed."""

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_hit_tokens: int = 0
    num_bypasses: int = 0
