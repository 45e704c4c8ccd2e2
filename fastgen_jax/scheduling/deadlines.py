"""Which prompts can still be on time, and in which order."""

from __future__ import annotations

import heapq
import math
from operator import attrgetter
from typing import NamedTuple

from fastgen_jax.scheduling.pace import Pace
from fastgen_jax.scheduling.planner import Planner
from fastgen_jax.scheduling.sequence import Sequence

_MAX_EXAMINED = 256  # waiting sequences that are examined in a step, the oldest, so that a long queue stays cheap


class Prompts(NamedTuple):
    """Prompts that can be on time, prompts that cannot, both in the order to run them, and requests to refuse."""

    on_time: list[Sequence]
    late: list[Sequence]
    refused: list[Sequence]


class _Job(NamedTuple):
    rank: tuple[int, int, float, tuple[int, float, int]]  # sort key: priority, 0 to precede all deadlines, deadline, order
    tokens: int
    deadline: float
    droppable: bool
    sequence: Sequence


def feasible_prompts(planner: Planner, pace: Pace) -> Prompts:
    """The largest set of prompts that can all be on time, by deadline, and what happens to the others.

    Assumes that all steps are like this one after generation was planned: the planner's chunks, and prompts in the
    tokens that are left. Running prompts and sequences that ran before are always in the set. Among the others, the
    longest is dropped whenever a prompt would be late (Moore and Hodgson, Management Science 1968). A sequence that
    cannot be on time even alone may use leftover tokens until `grace` seconds after its deadline; then it is refused.
    """
    limits = planner.limits
    now = pace.now()
    prompt_tokens = planner.tokens_left
    step_seconds = pace.seconds(prompt_tokens + len(planner.plan.chunks))
    seconds_per_token = step_seconds / max(1, prompt_tokens)
    least_seconds_per_token = pace.seconds(limits.token_budget) / limits.token_budget

    jobs: list[_Job] = []
    late: list[Sequence] = []
    refused: list[Sequence] = []
    for sequence in planner.running[: planner.num_kept]:
        left = sequence.remaining
        if left > 1:
            deadline = pace.promise.deadline(sequence)
            # One that is already late runs first, so that it is done soon, but nothing else is dropped for it.
            hopeless = now + left * least_seconds_per_token > deadline
            behind, due = (0, -1.0) if hopeless else (1, deadline)
            rank = (sequence.order[0], behind, due, sequence.order)
            jobs.append(_Job(rank, left, math.inf if hopeless else deadline, False, sequence))
    for sequence in planner.waiting[:_MAX_EXAMINED]:
        priority = sequence.order[0]
        left = sequence.num_tokens - limits.block_size * planner.cached_prefix(sequence).num_blocks
        if sequence.num_tokens > sequence.num_prompt_tokens:  # preempted after its first token
            jobs.append(_Job((priority, 0, 0.0, sequence.order), left, math.inf, False, sequence))
            continue
        deadline = pace.promise.deadline(sequence)
        hopeless = now + left * least_seconds_per_token > deadline
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
    droppable: list[tuple[int, int, int]] = []  # a heap: the least important first, and of these the longest
    at = now + step_seconds  # one step is still in flight
    for index, job in enumerate(jobs):
        at += job.tokens * seconds_per_token
        if job.droppable:
            heapq.heappush(droppable, (-job.rank[0], -job.tokens, index))
        while at > job.deadline and droppable:
            _, minus_tokens, longest = heapq.heappop(droppable)
            at += minus_tokens * seconds_per_token
            dropped.add(longest)
    on_time = [job.sequence for index, job in enumerate(jobs) if index not in dropped]
    return Prompts(on_time, [jobs[index].sequence for index in sorted(dropped)] + late, refused)
