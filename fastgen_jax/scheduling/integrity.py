"""Checks the scheduler's bookkeeping for contradictions: for tests and for debugging."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.sequence import Sequence, SequenceStatus
from fastgen_jax.scheduling.state import SchedulerState


def check_state(state: SchedulerState, *, borrowed: Iterable[int]) -> None:
    """Checks every sequence, slot and block once; `borrowed` are the blocks held outside of any request.

    Raises:
        RuntimeError: the first contradiction found.
    """
    running, waiting = state.running, state.waiting
    live = [*running, *waiting]
    state.pool.check_integrity([*(sequence.block_ids for sequence in live), list(borrowed)])
    if {sequence.request_id: sequence for sequence in live} != state.unfinished:
        raise RuntimeError("the unfinished requests are not those that run or wait")
    for queue in (running, waiting):
        if any(a.order >= b.order for a, b in pairwise(queue)):
            raise RuntimeError(f"a queue is out of order: {queue}")
    slots = sorted([*(sequence.slot for sequence in running if sequence.slot is not None), *state.free_slots])
    if slots != list(range(state.max_num_seqs)):
        raise RuntimeError(f"every slot must be free or used exactly once, but these are: {slots}")
    for sequence in live:
        _check_sequence(sequence, state.groups)


def _check_sequence(sequence: Sequence, groups: BlockGroups) -> None:
    runs = sequence.status is SequenceStatus.RUNNING
    if runs != (sequence.slot is not None) or (sequence.block_ids and not runs):
        raise RuntimeError(f"only a running sequence has a slot and blocks, but this is {sequence}")
    if any(sequence.capacity != len(table) * groups.block_size for table in sequence.tables):
        raise RuntimeError(f"{sequence} has a capacity of {sequence.capacity} positions")
    freed = [groups.first_block(window, sequence.num_computed) for window in groups.windows if runs]
    if sequence.num_freed != freed or len(sequence.tables) != len(freed):
        raise RuntimeError(f"{sequence} has freed {sequence.num_freed} blocks of its groups but should have freed {freed}")
    if not sequence.num_computed <= min(sequence.num_tokens - 1, sequence.capacity):
        raise RuntimeError(f"{sequence} has computed more than it has tokens or blocks for")
    if not sequence.num_known_tokens <= sequence.num_tokens <= sequence.max_total_tokens:
        raise RuntimeError(f"{sequence} has {sequence.num_in_flight} tokens in flight")
