"""Runs of steps in which nothing is decided: every sequence generates, none waits, none ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastgen_jax.scheduling.block_pool import BlockPool
from fastgen_jax.scheduling.plan import StepLimits
from fastgen_jax.scheduling.sequence import Sequence


class SteadyRun(NamedTuple):
    """`num_steps` steps that would each compute one token of `num_sequences` sequences, and change nothing else.

    `contexts` are those of the sequences in the first step, with the token that it computes; each later step has one more
    token of each.
    """

    num_steps: int
    num_sequences: int
    contexts: list[int]


def steady_run(running: list[Sequence], limits: StepLimits, pool: BlockPool, *, in_flight: bool) -> SteadyRun | None:
    """The run that begins now, if no sequence waits and the step in flight, if any, belongs to such a run too.

    It ends before the step or commit that ends a sequence, completes a block for the prefix cache or frees one. None if
    a token could end a sequence, or if blocks are short.
    """
    num_sequences = len(running)
    if not 0 < num_sequences <= min(limits.token_budget, limits.max_sample_rows):
        return None
    num_steps = running[0].max_total_tokens
    for sequence in running:
        computed = sequence.num_computed
        if computed != sequence.num_tokens - 1 or sequence.stop_ids:
            return None
        # The very last token is never computed; a commit follows each step, immediately unless one is in flight.
        left = min(sequence.max_total_tokens - 1, sequence.next_block_end - 1, sequence.next_free - 1) - computed
        if left < num_steps:
            num_steps = left
    num_steps -= not in_flight
    if num_steps < 1:
        return None
    most_blocks = num_sequences * (1 + num_steps // limits.block_size) * limits.groups.num_groups
    if most_blocks > pool.num_free:
        return None
    return SteadyRun(num_steps, num_sequences, [sequence.num_computed + 1 for sequence in running])


def advance(running: list[Sequence], num_steps: int, token_ids: Iterable[int], pool: BlockPool) -> None:
    """Computes and commits `num_steps` tokens of each sequence, all the same `token_ids`.

    Blocks are allocated in the order in which the single steps would allocate them.
    """
    token_ids = list(token_ids)
    needed: list[tuple[int, int]] = []  # (step, index in the step)
    for index, sequence in enumerate(running):
        computed = sequence.num_computed
        first = sequence.capacity - computed  # the first step without room
        if first < num_steps:
            needed += [(step, index) for step in range(first, num_steps, pool.block_size)]
        sequence.num_computed = computed + num_steps
        sequence.num_tokens += num_steps
        sequence.output_token_ids += token_ids
    for _, index in sorted(needed):
        sequence = running[index]
        for table in sequence.tables:
            table += pool.allocate(1)
        sequence.capacity += pool.block_size
