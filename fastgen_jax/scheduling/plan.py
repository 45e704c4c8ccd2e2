"""What a policy is given, what it returns, and the pieces that policies are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fastgen_jax.scheduling.block_pool import BlockLedger
from fastgen_jax.scheduling.sequence import Sequence
from fastgen_jax.scheduling.step import Chunk

_MAX_BLOCKED = 8  # waiting sequences without room that are looked at in a step, so that a long queue costs little


class Admission(NamedTuple):
    """A waiting sequence that gets a slot and starts behind the blocks it found in the prefix cache."""

    sequence: Sequence
    cached_block_ids: list[int]


class StepPlan(NamedTuple):
    """What a policy decided.

    `bypassed` names a sequence once for each other that overtakes it. `refused` are waiting sequences that never
    ran and shall not: their promise cannot be kept.
    """

    chunks: list[Chunk]
    admissions: list[Admission]
    preempted: list[Sequence]
    bypassed: list[Sequence]
    refused: list[Sequence]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """What one step and the pool can hold.

    A step holds `token_budget` tokens, `max_num_seqs` sequences have a slot, `max_sample_rows` logit rows are
    computed. `watermark_blocks` stay free when a sequence is admitted beside others. A waiting sequence is
    overtaken at most `max_bypasses` times.
    """

    token_budget: int
    max_num_seqs: int
    max_sample_rows: int
    block_size: int
    watermark_blocks: int
    max_bypasses: int


class Draft:
    """A plan in the making, and what is left of the step's limits.

    Reads `running` and `waiting`, which are in the order of their claim to run; changes only itself and
    `blocks`.
    """

    def __init__(
        self,
        running: list[Sequence],
        waiting: list[Sequence],
        limits: StepLimits,
        blocks: BlockLedger,
        cached_prefix: Callable[[Sequence], list[int]],
    ) -> None:
        self.plan = StepPlan([], [], [], [], [])
        self.running = running
        self.num_kept = len(running)  # running[num_kept:] are preempted
        self.waiting = waiting
        self.limits = limits
        self.blocks = blocks
        self.cached_prefix = cached_prefix
        self.tokens_left = limits.token_budget
        self.rows_left = limits.max_sample_rows
        self.short_of_blocks = False  # a prompt under way was cut, or stopped, for want of blocks

    def generate(self) -> None:
        """Adds one token for each running sequence that has one left to compute."""
        chunks, preempted = self.plan.chunks, self.plan.preempted
        room = min(self.tokens_left, self.rows_left)
        append = chunks.append
        for sequence in self.running:
            start = sequence.num_computed
            # With max_total_tokens - 1 computed, the last token is in flight: its commit ends the sequence.
            if start != sequence.num_tokens - 1 or start == sequence.max_total_tokens - 1:
                continue
            if sequence.awaits_each_token and sequence.num_in_flight:
                continue
            if not room or (preempted and sequence.order >= preempted[-1].order):
                break
            if start == sequence.capacity and not self._take_block_for(sequence):
                break
            room -= 1
            append(_new_chunk(Chunk, (sequence, start, 1, 1, True)))
        self.tokens_left -= len(chunks)
        self.rows_left -= len(chunks)

    def continue_prompts(self) -> None:
        """Adds as much of the prompts under way as fits, in order."""
        for sequence in self._prompts_under_way():
            if not self.tokens_left:
                return
            self._continue(sequence)

    def admit(self, *, whole: bool) -> None:
        """Adds waiting sequences in order; `whole` takes none that would have to be cut, nor any behind it.

        Steps over sequences for which there is no memory, within the limits of bounded bypass.
        """
        if self.plan.preempted or self.short_of_blocks:
            return
        num_blocked = 0
        blocked: list[Sequence] = []
        tolerance = self.limits.max_bypasses  # how many may still overtake those in `blocked`
        for sequence in self.waiting:
            if not self.tokens_left or not self._has_slot():
                return
            cached = self._start_of(sequence)
            chunk = None
            if cached is not None:
                start = len(cached) * self.limits.block_size
                tokens, rows = self.tokens_left, self.rows_left
                if whole:
                    tokens, rows = self.limits.token_budget, self.limits.max_sample_rows
                chunk = self._cut(sequence, start, tokens, rows)
                if chunk and not self._has_room(chunk, cached):
                    chunk = None
            if cached is None or chunk is None:
                tolerance = min(tolerance, self.limits.max_bypasses - sequence.num_bypasses)
                num_blocked += 1
                if tolerance <= 0 or num_blocked > _MAX_BLOCKED:
                    return
                blocked.append(sequence)
                continue
            if whole and not (
                chunk.samples and chunk.length <= self.tokens_left and chunk.num_sample_rows <= self.rows_left
            ):
                return
            self._admit(chunk, cached)
            if blocked:
                self.plan.bypassed.extend(blocked)
                tolerance -= 1
                if tolerance == 0:
                    return

    def limit(self, num_tokens: float) -> None:
        """Makes a step with generation in it no larger than `num_tokens`, but for a block of prompt.

        The block lets prompts under way advance, whatever generation alone takes.
        """
        if self.plan.chunks:
            prompt = max(num_tokens - len(self.plan.chunks), self.limits.block_size)
            self.tokens_left = int(min(self.tokens_left, prompt))

    def take_in_line(self, line: list[Sequence], leftover: list[Sequence]) -> None:
        """Continues or admits the sequences of `line` in its order, splitting the last to fit.

        What is left over goes to those of `leftover`, whole beside prompts of `line`. Whoever is before an admitted
        sequence in the order of waiting is bypassed by it; where that is no longer allowed, and where there is no
        memory, a sequence is stepped over.
        """
        counts: Counter[Sequence] = Counter()  # bypasses by this plan
        left = [sequence for sequence in self.waiting if sequence not in self.plan.refused]
        num_blocked = 0
        for index, sequence in enumerate((*line, *leftover)):
            if not self.tokens_left:
                break
            if sequence.slot is not None:
                self._continue(sequence)
                continue
            if self.plan.preempted or self.short_of_blocks or not self._has_slot() or num_blocked > _MAX_BLOCKED:
                continue
            overtaken = [other for other in left if other.order < sequence.order]
            most = self.limits.max_bypasses
            if any(other.num_bypasses + counts[other] >= most for other in overtaken):
                continue
            cached = self._start_of(sequence)
            if cached is None:
                continue
            chunk = self._cut(sequence, len(cached) * self.limits.block_size, self.tokens_left, self.rows_left)
            if chunk is None or not self._has_room(chunk, cached):
                num_blocked += 1
                continue
            if index >= len(line) > 0 and not chunk.samples:
                continue
            self._admit(chunk, cached)
            left.remove(sequence)
            counts.update(overtaken)
        # Who was admitted later in the same step was not bypassed after all.
        self.plan.bypassed.extend(other for other in counts.elements() if other in left)

    def prompt_alone(self, *, beside_generation: bool) -> bool:
        """Gives the step to the prompt that is first in line, if a step could not hold the whole of it.

        `beside_generation`: the step would have to hold a token of each generating sequence too. False, and
        nothing is added, if there is no such prompt, or no room for it in memory.
        """
        under_way = self._prompts_under_way()
        if under_way:
            self._continue(under_way[0])
            return bool(self.plan.chunks)
        if not self.waiting or not self._has_slot():
            return False
        sequence = self.waiting[0]
        cached = self._start_of(sequence)
        if cached is None:
            return False
        limits = self.limits
        start = len(cached) * limits.block_size
        others = len(self.running) if beside_generation else 0
        beside = self._cut(sequence, start, limits.token_budget - others, limits.max_sample_rows - others)
        if beside is not None and beside.samples:
            return False
        alone = self._cut(sequence, start, limits.token_budget, limits.max_sample_rows)
        if alone is None or not self._has_room(alone, cached):
            return False
        self._admit(alone, cached)
        return True

    def finish(self) -> StepPlan:
        """Gives the plan, after a last resort that keeps things moving.

        If prompts under way hold all blocks and nothing could be added, the last give way to the first.
        While tokens are in flight their commit may free blocks instead.
        """
        if not self.plan.chunks and self.running and not any(sequence.num_in_flight for sequence in self.running):
            self._continue(self.running[0])
            while not self.plan.chunks and self.num_kept > 1:
                self._preempt_last()
                self._continue(self.running[0])
        return self.plan

    def _prompts_under_way(self) -> list[Sequence]:
        return [s for s in self.running[: self.num_kept] if s.num_tokens - s.num_computed > 1]

    def _has_slot(self) -> bool:
        return self.num_kept + len(self.plan.admissions) < self.limits.max_num_seqs

    def _start_of(self, sequence: Sequence) -> list[int] | None:
        """The cached blocks that a waiting sequence can start behind; None while it has tokens in flight."""
        return None if sequence.num_in_flight else self.cached_prefix(sequence)

    def _cut(self, sequence: Sequence, start: int, tokens: int, rows: int) -> Chunk | None:
        """The longest chunk from `start` within `tokens` tokens and `rows` logit rows; None if empty."""
        first_row = max(start, sequence.first_row)
        stop = min(sequence.num_tokens, start + tokens, first_row + rows)
        if stop <= start:
            return None
        return Chunk(sequence, start, stop - start, max(0, stop - first_row), stop == sequence.num_tokens)

    def _has_room(self, chunk: Chunk, cached: list[int]) -> bool:
        sequence = chunk.sequence
        stop = sequence.num_tokens if sequence.num_preemptions else chunk.start + chunk.length
        cost = -(-stop // self.limits.block_size) - len(cached) + self.blocks.cost_of_sharing(cached)
        others = self.num_kept or self.plan.admissions
        return cost + (self.limits.watermark_blocks if others else 0) <= self.blocks.available

    def _admit(self, chunk: Chunk, cached: list[int]) -> None:
        self.plan.admissions.append(Admission(chunk.sequence, cached))
        self.blocks.share(cached)
        self._add(chunk, len(cached))

    def _continue(self, sequence: Sequence) -> None:
        """Adds as much of a running prompt as the step and the free blocks hold.

        Beside other chunks the watermark is kept: those that generate need their next blocks soon.
        """
        block_size = self.limits.block_size
        start = sequence.num_computed
        usable = self.blocks.available - (self.limits.watermark_blocks if self.plan.chunks else 0)
        room = sequence.capacity + max(0, usable) * block_size - start
        if room < min(self.tokens_left, sequence.num_tokens - start):
            self.short_of_blocks = True
        chunk = self._cut(sequence, start, min(self.tokens_left, room), self.rows_left)
        if chunk is not None:
            self._add(chunk, sequence.capacity // block_size)

    def _add(self, chunk: Chunk, num_held_blocks: int) -> None:
        self.plan.chunks.append(chunk)
        self.tokens_left -= chunk.length
        self.rows_left -= chunk.num_sample_rows
        num_blocks = -(-(chunk.start + chunk.length) // self.limits.block_size)
        if num_blocks > num_held_blocks:
            self.blocks.take(num_blocks - num_held_blocks)

    def _take_block_for(self, sequence: Sequence) -> bool:
        """Takes a block, if need be from the last running sequence; False if that is `sequence` itself."""
        while not self.blocks.available:
            if self._preempt_last() is sequence:
                return False
        self.blocks.take(1)
        return True

    def _preempt_last(self) -> Sequence:
        self.num_kept -= 1
        victim = self.running[self.num_kept]
        self.plan.preempted.append(victim)
        self.blocks.free(victim.block_ids)
        return victim


_new_chunk = tuple.__new__  # half the cost of calling Chunk, which matters once for each generating sequence
