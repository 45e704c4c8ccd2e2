"""An estimate of how long a request has to wait."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from fastgen_jax.scheduling.plan import StepLimits
from fastgen_jax.scheduling.sequence import Sequence


def steps_until_first_token(
    sequence: Sequence,
    running: Iterable[Sequence],
    ahead: Iterable[Sequence],
    *,
    limits: StepLimits,
    num_free_blocks: int,
) -> int:
    """Estimates the number of steps until `sequence`, which is behind `ahead` in the queue, has its first token.

    Assumes that prompts are computed one after another, in the part of the token budget that generating sequences
    leave, and that each sequence then holds its slot and blocks until its length limit. Early ends and prefix hits
    make the wait shorter; preemption, growing sequences and later requests with higher priority make it longer.
    """
    free_slots, free_blocks = limits.max_num_seqs, num_free_blocks
    num_generating = prompt_tokens = 0
    releases: list[tuple[float, int]] = []  # a heap of (step, blocks): when a slot and so many blocks become free
    for other in running:
        free_slots -= 1
        num_generating += other.remaining == 1
        prompt_tokens += other.remaining - 1
        releases.append((other.max_total_tokens - other.num_tokens, len(other.block_ids)))
    heapq.heapify(releases)
    rate = max(1, limits.token_budget - num_generating)  # prompt tokens per step
    prompts_done = prompt_tokens / rate
    now = 0.0

    for waiting in (*ahead, sequence):
        num_blocks = limits.groups.blocks_needed(waiting.num_tokens)
        while releases and (free_slots < 1 or free_blocks < num_blocks):
            step, released = heapq.heappop(releases)
            now = max(now, step)
            free_slots += 1
            free_blocks += released
        free_slots -= 1
        free_blocks -= num_blocks
        prompts_done = max(prompts_done, now) + waiting.num_tokens / rate
        left = waiting.max_total_tokens - waiting.num_tokens
        heapq.heappush(releases, (prompts_done + left, num_blocks))
    return max(1, math.ceil(prompts_done))
