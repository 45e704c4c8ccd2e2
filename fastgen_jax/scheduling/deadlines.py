"""Which prompts can still be in time, and in which order."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from fastgen_jax.scheduling.pace import Pace
from fastgen_jax.scheduling.plan import StepLimits
from fastgen_jax.scheduling.sequence import Sequence

_MAX_LINE = 256  # waiting sequences that are looked at in a step, the oldest, so that a long queue costs little


def feasible_line(
    running: list[Sequence],
    waiting: list[Sequence],
    pace: Pace,
    limits: StepLimits,
    *,
    prompt_tokens: int,
    num_generating: int,
    cached_prefix: Callable[[Sequence], list[int]],
) -> tuple[list[Sequence], list[Sequence]]:
    """The prompts to compute, in order, and the waiting sequences to refuse.

    Steps like the next one hold `prompt_tokens` tokens of prompts beside `num_generating` others. Prompts under way
    and sequences that ran before are always in the line; of the others the largest set that can be in time is, found by
    dropping the longest where somebody would be late (Moore and Hodgson, Management Science 1968). Who is dropped but
    not hopeless goes on waiting.
    """
    now = pace.now()
    step_seconds = pace.seconds(prompt_tokens + num_generating)
    seconds_a_token = step_seconds / max(1, prompt_tokens)
    least_seconds_a_token = pace.seconds(limits.token_budget) / limits.token_budget

    jobs: list[tuple[tuple[int, int, float, tuple[int, float, int]], int, float, Sequence]] = []
    refused: list[Sequence] = []
    for sequence in running:
        if sequence.remaining > 1:
            deadline = pace.promise.deadline(sequence)
            jobs.append(((sequence.order[0], 1, deadline, sequence.order), sequence.remaining, math.inf, sequence))
    for sequence in waiting[:_MAX_LINE]:
        priority = sequence.order[0]
        left = sequence.num_tokens - limits.block_size * len(cached_prefix(sequence))
        if sequence.num_preemptions:  # it was accepted, and its reader has begun
            jobs.append(((priority, 0, 0.0, sequence.order), left, math.inf, sequence))
            continue
        deadline = pace.promise.deadline(sequence)
        if now + left * least_seconds_a_token > deadline:
            refused.append(sequence)
        elif sequence.num_bypasses >= limits.max_bypasses:
            jobs.append(((priority, 0, 0.0, sequence.order), left, math.inf, sequence))
        else:
            jobs.append(((priority, 1, deadline, sequence.order), left, deadline, sequence))
    if not prompt_tokens:
        return [], refused
    jobs.sort(key=lambda job: job[0])

    dropped: set[Sequence] = set()
    droppable: list[tuple[int, int, int]] = []  # a heap: the least important first, of these the longest
    at = now + step_seconds  # a step is still in flight
    for index, (key, left, deadline, _) in enumerate(jobs):
        at += left * seconds_a_token
        if deadline < math.inf:
            heapq.heappush(droppable, (-key[0], -left, index))
        if at > deadline and droppable:
            _, minus_left, longest = heapq.heappop(droppable)
            at += minus_left * seconds_a_token
            dropped.add(jobs[longest][3])
    line = [job[3] for job in jobs if job[3] not in dropped]
    if not line and jobs and not running:
        line = [jobs[0][3]]  # an idle device serves somebody
    return line, refused
