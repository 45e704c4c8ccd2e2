"""The scheduler's books, checked against each other: for tests and for whoever hunts a defect."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from itertools import pairwise

from fastgen_jax.scheduling.block_pool import BlockPool
from fastgen_jax.scheduling.sequence import Sequence, SequenceStatus


def check_books(
    *,
    running: Ordered[Sequence],
    waiting: Ordered[Sequence],
    unfinished: Mapping[str, Sequence],
    free_slots: Ordered[int],
    borrowed: list[int],
    pool: BlockPool,
    max_num_seqs: int,
) -> None:
    """Looks at every sequence, slot and block once.

    Raises:
        RuntimeError: the first contradiction found.
    """
    live = [*running, *waiting]
    pool.check_integrity([*(sequence.block_ids for sequence in live), borrowed])
    if {sequence.request_id: sequence for sequence in live} != unfinished:
        raise RuntimeError("the unfinished requests are not those that run or wait")
    for queue in (running, waiting):
        if any(a.order >= b.order for a, b in pairwise(queue)):
            raise RuntimeError(f"a queue is out of order: {queue}")
    slots = sorted([*(sequence.slot for sequence in running if sequence.slot is not None), *free_slots])
    if slots != list(range(max_num_seqs)):
        raise RuntimeError(f"every slot must be free or used exactly once, but these are: {slots}")
    for sequence in live:
        _check_sequence(sequence, pool.block_size)


def _check_sequence(sequence: Sequence, block_size: int) -> None:
    runs = sequence.status is SequenceStatus.RUNNING
    if runs != (sequence.slot is not None) or (sequence.block_ids and not runs):
        raise RuntimeError(f"only a running sequence has a slot and blocks, but this is {sequence}")
    if sequence.capacity != len(sequence.block_ids) * block_size:
        raise RuntimeError(f"{sequence} counts a capacity of {sequence.capacity} positions")
    if not sequence.num_computed <= min(sequence.num_tokens - 1, sequence.capacity):
        raise RuntimeError(f"{sequence} has computed more than it has tokens or blocks for")
    if not sequence.num_known_tokens <= sequence.num_tokens <= sequence.max_total_tokens:
        raise RuntimeError(f"{sequence} counts {sequence.num_in_flight} tokens in flight")
