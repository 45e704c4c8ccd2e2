"""A plan for one step, and the limits that it must respect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.prefix import Prefix
from fastgen_jax.scheduling.sequence import Sequence
from fastgen_jax.scheduling.step import Chunk


class Admission(NamedTuple):
    """A waiting sequence that gets a slot and starts after the blocks found in the prefix cache."""

    sequence: Sequence
    cached: Prefix


class StepPlan(NamedTuple):
    """What a policy decided.

    `bypassed` lists a sequence once for each sequence that overtakes it. `refused` lists waiting sequences that never
    ran and are rejected because their promise cannot be kept.
    """

    chunks: list[Chunk]
    admissions: list[Admission]
    preempted: list[Sequence]
    bypassed: list[Sequence]
    refused: list[Sequence]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """What one step and the block pool can hold.

    A step holds `token_budget` tokens, `max_num_seqs` sequences have a slot, and `max_sample_rows` rows of logits are
    computed. `groups` says how many blocks of `block_size` tokens a sequence holds. `watermark_blocks` stay free when a
    sequence is admitted next to others. A waiting sequence is overtaken at most `max_bypasses` times. With a `chunk_size`
    all chunks are those of `fixed_chunks`.
    """

    token_budget: int
    max_num_seqs: int
    max_sample_rows: int
    block_size: int
    groups: BlockGroups
    watermark_blocks: int
    max_bypasses: int
    chunk_size: int | None = None
