"""Which prompts can still be in time, and in which order."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from fastgen_jax.scheduling.pace import Pace
from fastgen_jax.scheduling.plan import StepLimits
from fastgen_jax.scheduling.sequence import Sequence

_MAX_LINE = 256  # waiting sequences that are looked at in a step, the oldest, so that a long queue costs little


class Line(NamedTuple):
    """Who is served by deadline, who may have what is left over, both in order, and who is refused."""

    in_time: list[Sequence]
    leftover: list[Sequence]
    refused: list[Sequence]


class _Job(NamedTuple):
    rank: tuple[int, int, float, tuple[int, float, int]]  # sorts: priority, 0 before everybody's deadline, deadline, order
    tokens: int
    deadline: float
    droppable: bool
    sequence: Sequence


def feasible_line(
    running: list[Sequence],
    waiting: list[Sequence],
    pace: Pace,
    limits: StepLimits,
    *,
    prompt_tokens: int,
    num_generating: int,
    cached_prefix: Callable[[Sequence], list[int]],
) -> Line:
    """The largest set of prompts that can all be in time, by deadline, and what becomes of the others.

    Steps like the next one hold `prompt_tokens` tokens of prompts beside `num_generating` others. Prompts under way
    and sequences that ran before are always in the set. Of the others the longest is dropped wherever somebody would be
    late (Moore and Hodgson, Management Science 1968). A sequence that cannot be in time any more, not even
    alone, may have what is left over during `grace` seconds after its deadline; then it is refused.
    """
    now = pace.now()
    step_seconds = pace.seconds(prompt_tokens + num_generating)
    seconds_a_token = step_seconds / max(1, prompt_tokens)
    least_seconds_a_token = pace.seconds(limits.token_budget) / limits.token_budget

    jobs: list[_Job] = []
    late: list[Sequence] = []
    refused: list[Sequence] = []
    for sequence in running:
        left = sequence.remaining
        if left > 1:
            deadline = pace.promise.deadline(sequence)
            # One that is late already is first, so that it is over soon, but nobody else is dropped for it.
            hopeless = now + left * least_seconds_a_token > deadline
            place = (0, -1.0) if hopeless else (1, deadline)
            rank = (sequence.order[0], *place, sequence.order)
            jobs.append(_Job(rank, left, math.inf if hopeless else deadline, False, sequence))
    for sequence in waiting[:_MAX_LINE]:
        priority = sequence.order[0]
        left = sequence.num_tokens - limits.block_size * len(cached_prefix(sequence))
        if sequence.num_tokens > sequence.num_prompt_tokens:  # it was preempted, but its reader has begun
            jobs.append(_Job((priority, 0, 0.0, sequence.order), left, math.inf, False, sequence))
            continue
        deadline = pace.promise.deadline(sequence)
        hopeless = now + left * least_seconds_a_token > deadline
        overtaken = sequence.num_bypasses >= limits.max_bypasses
        if now > deadline + pace.promise.grace or (hopeless and overtaken):
            refused.append(sequence)
        elif overtaken:
            jobs.append(_Job((priority, 0, 0.0, sequence.order), left, math.inf, False, sequence))
        elif hopeless:
            late.append(sequence)
        else:
            jobs.append(_Job((priority, 1, deadline, sequence.order), left, deadline, True, sequence))
    jobs.sort(key=attrgetter("rank"))

    dropped: set[int] = set()
    droppable: list[tuple[int, int, int]] = []  # a heap: the least important first, of these the longest
    at = now + step_seconds  # a step is still in flight
    for index, job in enumerate(jobs):
        at += job.tokens * seconds_a_token
        if job.droppable:
            heapq.heappush(droppable, (-job.rank[0], -job.tokens, index))
        while at > job.deadline and droppable:
            _, minus_tokens, longest = heapq.heappop(droppable)
            at += minus_tokens * seconds_a_token
            dropped.add(longest)
    in_time = [job.sequence for index, job in enumerate(jobs) if index not in dropped]
    return Line(in_time, [jobs[index].sequence for index in sorted(dropped)] + late, refused)
