"""The object that a policy plans with: what it may look at, and the operations that policies are built from."""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import KW_ONLY, dataclass, field

from fastgen_jax.scheduling.block_pool import BlockLedger
from fastgen_jax.scheduling.fixed_chunks import end_of_fixed_chunk
from fastgen_jax.scheduling.images import end_of_chunk
from fastgen_jax.scheduling.pace import Pace
from fastgen_jax.scheduling.plan import Admission, StepLimits, StepPlan
from fastgen_jax.scheduling.prefix import Prefix
from fastgen_jax.scheduling.sequence import Sequence
from fastgen_jax.scheduling.step import Chunk

_MAX_BLOCKED = 8  # waiting sequences without room that are examined in a step, so that a long queue stays cheap


@dataclass(slots=True, eq=False, repr=False)
class Planner:
    """One step in the making: the sequences, the limits, and what is left of them.

    Each step gets a new planner. A policy calls its methods and returns `finish()`. Nothing that a policy does here
    changes the scheduler: `plan` and `blocks` belong to the planner alone, and the queues and sequences are only read.
    A policy may assign another order to `waiting` or `running`.
    """

    running: abc.Sequence[Sequence]
    """Sequences with a slot, by priority, then arrival time, then order of adding. A sequence carries its `request`."""
    waiting: abc.Sequence[Sequence]
    """Sequences without a slot, in the same order."""
    _: KW_ONLY
    limits: StepLimits
    """What the step and the block pool can hold."""
    blocks: BlockLedger
    """Counts the free KV blocks as the plan grows."""
    cached_prefix: abc.Callable[[Sequence], Prefix]
    """Returns the registered blocks that a waiting sequence could start after."""
    now: abc.Callable[[], float]
    """Returns the time in seconds, on the clock of the requests' arrival times."""
    pace: Pace | None = None
    """What steps cost and what was promised; None for policies without a promise."""
    plan: StepPlan = field(init=False)
    """The plan so far."""
    num_kept: int = field(init=False)
    """Number of running sequences that the plan keeps; `running[num_kept:]` are preempted."""
    tokens_left: int = field(init=False)
    """Tokens that the step can still hold."""
    rows_left: int = field(init=False)
    """Rows of logits that the step can still compute."""
    short_of_blocks: bool = field(init=False, default=False)
    """Whether a running prompt got fewer tokens than the step had room for, because no blocks were free."""

    def __post_init__(self) -> None:
        self.plan = StepPlan([], [], [], [], [])
        self.num_kept = len(self.running)
        self.tokens_left = self.limits.token_budget
        self.rows_left = self.limits.max_sample_rows

    def isolated(self) -> Planner:
        """A planner for the same step with a separate block count, whose queues cannot be changed in place."""
        return Planner(
            tuple(self.running),
            tuple(self.waiting),
            limits=self.limits,
            blocks=self.blocks.copy(),
            cached_prefix=self.cached_prefix,
            now=self.now,
            pace=self.pace,
        )

    @property
    def free_blocks(self) -> int:
        """KV blocks that the plan can still use."""
        return self.blocks.available

    # One sequence

    def fits(self, sequence: Sequence) -> bool:
        """Whether `take` would add all tokens that the sequence has left to compute."""
        if sequence.slot is not None:
            chunk = self._next_chunk(sequence) if self._can_advance(sequence) else None
        else:
            chunk, _ = self._first_chunk(sequence)
        return chunk is not None and chunk.samples

    def take(self, sequence: Sequence) -> bool:
        """Adds as many tokens as fit of a running sequence, or admits a waiting one; returns whether it added any.

        Take each sequence at most once. `max_bypasses` is not considered here: a policy that lets a sequence overtake
        others adds those to `plan.bypassed`.
        """
        if sequence.slot is not None:
            return self._can_advance(sequence) and self._continue(sequence)
        chunk, cached = self._first_chunk(sequence)
        if chunk is None:
            return False
        self._admit(chunk, cached)
        return True

    def preempt_last(self) -> Sequence:
        """Takes slot and blocks from the last sequence that still runs, and returns it."""
        self.num_kept -= 1
        victim = self.running[self.num_kept]
        self.plan.preempted.append(victim)
        self.blocks.free(victim.block_ids)
        return victim

    # Many sequences

    def generate(self) -> None:
        """Adds one token for each running sequence that has one left to compute.

        Where no block is free for it, the last running sequence is preempted, which may be the sequence itself.
        """
        chunks, preempted = self.plan.chunks, self.plan.preempted
        room = min(self.tokens_left, self.rows_left)
        append = chunks.append
        for sequence in self.running:
            start = sequence.num_computed
            # With max_total_tokens - 1 computed, the last token is in flight: its commit ends the sequence.
            if start != sequence.num_tokens - 1 or start == sequence.max_total_tokens - 1:
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
        """Adds as much of the running prompts as fits, in order."""
        for sequence in self._running_prompts():
            if not self.tokens_left:
                return
            self._continue(sequence)

    def admit(self, *, whole: bool = False) -> None:
        """Admits waiting sequences in order; `whole` stops at the first that would have to be split.

        Skips sequences for which there is no memory, within the limits of bounded bypass. Admits none in a step that
        preempts, nor while a running prompt lacks blocks.
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
                start = cached.num_blocks * self.limits.block_size
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

    def limit_tokens(self, num_tokens: float) -> None:
        """Limits a step that generates to `num_tokens` tokens, but always leaves room for one block of prompt.

        The block lets running prompts advance regardless of how many tokens generation needs.
        """
        if self.plan.chunks:
            prompt = max(num_tokens - len(self.plan.chunks), self.limits.block_size)
            self.tokens_left = int(min(self.tokens_left, prompt))

    def take_in_order(self, first: list[Sequence], leftover: list[Sequence]) -> None:
        """Continues or admits the sequences of `first` in order, splitting the last to fit.

        The tokens that remain go to those of `leftover`, which are not split next to prompts of `first`. An admitted
        sequence bypasses every waiting one that is before it in the queue. A sequence is skipped if it would exceed
        the allowed bypasses, or if there is no memory for it.
        """
        counts: Counter[Sequence] = Counter()  # bypasses by this plan
        left = [sequence for sequence in self.waiting if sequence not in self.plan.refused]
        num_blocked = 0
        for index, sequence in enumerate((*first, *leftover)):
            if not self.tokens_left:
                break
            if sequence.slot is not None:
                self._continue(sequence)
                continue
            if not self._may_admit() or num_blocked > _MAX_BLOCKED:
                continue
            overtaken = [other for other in left if other.order < sequence.order]
            most = self.limits.max_bypasses
            if any(other.num_bypasses + counts[other] >= most for other in overtaken):
                continue
            cached = self._start_of(sequence)
            if cached is None:
                continue
            chunk = self._cut(sequence, cached.num_blocks * self.limits.block_size, self.tokens_left, self.rows_left)
            if chunk is None or not self._has_room(chunk, cached):
                num_blocked += 1
                continue
            if index >= len(first) > 0 and not chunk.samples:
                continue
            self._admit(chunk, cached)
            left.remove(sequence)
            counts.update(overtaken)
        # A sequence that is admitted later in the same step was not bypassed after all.
        self.plan.bypassed.extend(other for other in counts.elements() if other in left)

    def run_prompt_alone(self, *, with_generation: bool) -> bool:
        """Fills the step with the first prompt, if no step could hold all of it; returns whether it did.

        With `with_generation` a step must also hold a token of each generating sequence. Nothing is added if there
        is no such prompt, or no memory for it.
        """
        prompts = self._running_prompts()
        if prompts:
            self._continue(prompts[0])
            return bool(self.plan.chunks)
        if not self.waiting or not self._has_slot():
            return False
        sequence = self.waiting[0]
        cached = self._start_of(sequence)
        if cached is None:
            return False
        limits = self.limits
        start = cached.num_blocks * limits.block_size
        others = len(self.running) if with_generation else 0
        shared = self._cut(sequence, start, limits.token_budget - others, limits.max_sample_rows - others)
        if shared is not None and shared.samples:
            return False
        alone = self._cut(sequence, start, limits.token_budget, limits.max_sample_rows)
        if alone is None or not self._has_room(alone, cached):
            return False
        self._admit(alone, cached)
        return True

    def finish(self) -> StepPlan:
        """Returns the plan, after preempting running prompts if that is the only way to make progress.

        If running prompts hold all blocks and nothing could be added, the last ones are preempted until the first one
        advances. While tokens are in flight nothing is preempted: their commit may free blocks.
        """
        if not self.plan.chunks and self.running and not any(sequence.num_in_flight for sequence in self.running):
            self._continue(self.running[0])
            while not self.plan.chunks and self.num_kept > 1:
                self.preempt_last()
                self._continue(self.running[0])
        return self.plan

    # Parts of the above

    def _running_prompts(self) -> list[Sequence]:
        return [s for s in self.running[: self.num_kept] if s.num_tokens - s.num_computed > 1]

    def _has_slot(self) -> bool:
        return self.num_kept + len(self.plan.admissions) < self.limits.max_num_seqs

    def _may_admit(self) -> bool:
        return self._has_slot() and not self.plan.preempted and not self.short_of_blocks

    def _start_of(self, sequence: Sequence) -> Prefix | None:
        """The cached blocks that a waiting sequence can start after; None while it has tokens in flight."""
        return None if sequence.num_in_flight else self.cached_prefix(sequence)

    def _cut(self, sequence: Sequence, start: int, tokens: int, rows: int) -> Chunk | None:
        """The longest chunk from `start` within `tokens` tokens and `rows` rows of logits; None if it is empty.

        It does not end within an image whose tokens must be computed in one step. A fixed chunk is as long as it is: None if
        it does not fit.
        """
        first_row = max(start, sequence.first_row)
        stop = min(sequence.num_tokens, start + tokens, first_row + rows)
        if sequence.request.images:
            stop = end_of_chunk(sequence.request.images, stop)
        if self.limits.chunk_size is not None:
            fixed = end_of_fixed_chunk(sequence, start, self.limits.chunk_size)
            stop = fixed if fixed <= stop else start
        if stop <= start:
            return None
        return Chunk(sequence, start, stop - start, max(0, stop - first_row), stop == sequence.num_tokens)

    def _has_room(self, chunk: Chunk, cached: Prefix) -> bool:
        sequence, limits = chunk.sequence, self.limits
        stop = sequence.num_tokens if sequence.num_preemptions else chunk.start + chunk.length
        num_new = -(-stop // limits.block_size) - cached.num_blocks
        cost = limits.groups.new_blocks(num_new, cached.tables) + self.blocks.cost_of_sharing(cached.block_ids)
        others = self.num_kept or self.plan.admissions
        return cost + (limits.watermark_blocks if others else 0) <= self.blocks.available

    def _first_chunk(self, sequence: Sequence) -> tuple[Chunk | None, Prefix]:
        """The chunk with which a waiting sequence can be admitted now, or None, and the cached blocks before it."""
        cached = self._start_of(sequence) if self._may_admit() else None
        if cached is None:
            return None, Prefix()
        chunk = self._cut(sequence, cached.num_blocks * self.limits.block_size, self.tokens_left, self.rows_left)
        return (chunk if chunk is not None and self._has_room(chunk, cached) else None), cached

    def _can_advance(self, sequence: Sequence) -> bool:
        """Whether a running sequence has a token to compute."""
        if sequence.num_computed >= min(sequence.num_tokens, sequence.max_total_tokens - 1):
            return False
        return sequence not in self.plan.preempted

    def _next_chunk(self, sequence: Sequence) -> Chunk | None:
        """The longest chunk of a running sequence that the step and the free blocks hold; None if it is empty."""
        tokens = min(self.tokens_left, self._room_for(sequence))
        return self._cut(sequence, sequence.num_computed, tokens, self.rows_left)

    def _room_for(self, sequence: Sequence) -> int:
        """Positions of a running sequence that its own and the free blocks can still hold.

        The watermark is kept next to other chunks: sequences that generate will soon need their next blocks.
        """
        usable = self.blocks.available - (self.limits.watermark_blocks if self.plan.chunks else 0)
        num_new = max(0, usable) // self.limits.groups.num_groups
        return sequence.capacity + num_new * self.limits.block_size - sequence.num_computed

    def _continue(self, sequence: Sequence) -> bool:
        wanted = sequence.remaining
        if self.limits.chunk_size is not None:
            start = sequence.num_computed
            wanted = end_of_fixed_chunk(sequence, start, self.limits.chunk_size) - start
        if self._room_for(sequence) < min(self.tokens_left, wanted):
            self.short_of_blocks = True
        chunk = self._next_chunk(sequence)
        if chunk is None:
            return False
        self._add(chunk, sequence.capacity // self.limits.block_size)
        return True

    def _admit(self, chunk: Chunk, cached: Prefix) -> None:
        self.plan.admissions.append(Admission(chunk.sequence, cached))
        self.blocks.share(cached.block_ids)
        self._add(chunk, cached.num_blocks)

    def _add(self, chunk: Chunk, num_held_blocks: int) -> None:
        self.plan.chunks.append(chunk)
        self.tokens_left -= chunk.length
        self.rows_left -= chunk.num_sample_rows
        num_blocks = -(-(chunk.start + chunk.length) // self.limits.block_size)
        if num_blocks > num_held_blocks:
            self.blocks.take((num_blocks - num_held_blocks) * self.limits.groups.num_groups)

    def _take_block_for(self, sequence: Sequence) -> bool:
        """Takes a block of each group, preempting the last running sequences if needed; False if that hits `sequence`."""
        num_groups = self.limits.groups.num_groups
        while self.blocks.available < num_groups:
            if self.preempt_last() is sequence:
                return False
        self.blocks.take(num_groups)
        return True


_new_chunk = tuple.__new__  # half the cost of calling Chunk, which matters once per generating sequence
