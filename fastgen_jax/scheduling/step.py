"""One step, as the engine executes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastgen_jax.scheduling.sequence import Sequence


class Chunk(NamedTuple):
    """The tokens at positions `[start, start + length)` of one sequence, computed in one step.

    Logits are computed for the last `num_sample_rows` positions. With `samples` a new token is sampled from the very
    last of them.
    """

    sequence: Sequence
    start: int
    length: int
    num_sample_rows: int
    samples: bool


class Step(NamedTuple):
    """One step to dispatch.

    `sampled` are the sequences whose chunk samples a new token, in chunk order. `block_updates` contains exactly what
    changed in the block tables, as `(row, first index, block ids)`: the whole table for a sequence in `admitted`,
    which got its slot in this step, without what a windowed group lacks. The table of cache group g is in row
    `g * max_num_seqs + slot`. Sequences in `preempted` lost their slots, which may be in use again in the same
    step.
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
    """Counts since the start. A prefix hit is a token whose KV was found in the prefix cache instead of computed."""

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_hit_tokens: int = 0
    num_bypasses: int = 0
