"""The scheduler: plans steps with a policy, carries the plans out, and commits their results."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import abc, deque
from functools import partial
from typing import get_args

from fastgen_jax.scheduling.block_pool import BlockLedger, BlockPool
from fastgen_jax.scheduling.estimate import steps_until_first_token
from fastgen_jax.scheduling.fixed_chunks import check_size, num_shareable
from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.integrity import check_state
from fastgen_jax.scheduling.limits import max_total_tokens
from fastgen_jax.scheduling.pace import Pace, Promise
from fastgen_jax.scheduling.plan import StepLimits, StepPlan
from fastgen_jax.scheduling.plan_check import CheckedPolicy, checked_policy
from fastgen_jax.scheduling.planner import Planner
from fastgen_jax.scheduling.policies import NEED_PROMISE, POLICIES, Policy
from fastgen_jax.scheduling.prefix import cached_prefix, register_blocks
from fastgen_jax.scheduling.request import Request
from fastgen_jax.scheduling.sequence import FinishReason, Sequence, SequenceStatus
from fastgen_jax.scheduling.state import ORDER, SchedulerState
from fastgen_jax.scheduling.steady import SteadyRun, advance, steady_run
from fastgen_jax.scheduling.step import Chunk, SchedulerStats, Step


class Scheduler:
    """Decides what each step computes.

    `add` a request; then, while there is work, `schedule()` a step, run it, and `commit` what it sampled.
    `schedule()` may be called again before the commit: sequences then run on tokens that are still on the device.
    Every step that `schedule()` returns must be run, in order, and committed, in order.

    Args:
        num_blocks: KV blocks in the pool, of `block_size` tokens each.
        windows: the sliding window of each cache group, in tokens; None for one whose layers attend to all tokens.
        token_budget: maximum number of tokens per step.
        max_num_seqs: sequences that can run at the same time.
        max_context_len: longest sequence in tokens, prompt and generated.
        max_sample_rows: maximum number of rows of logits per step.
        policy: a key of `POLICIES`, or a function of a `Planner` that returns a `StepPlan`, whose plans are checked.
        prefix_caching: whether full blocks are kept and shared.
        watermark_blocks: blocks that stay free when a sequence is admitted; None for 1% of the pool.
        max_bypasses: how many later sequences may overtake one for which there is no room.
        prefix_salt: distinguishes the digests of pools with different contents.
        promise: what a policy in `NEED_PROMISE` promises; None for the others.
        clock: returns seconds on the clock of the requests' arrival times; only policies read it.
        step_sizes: the sizes in tokens to which steps are padded, ascending; empty if they are not padded.
        chunk_size: if not None, how a request is cut into chunks depends on the request alone: a prompt every `chunk_size`
            tokens, a multiple of `block_size`, and what follows it into single tokens. See `fixed_chunks`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        windows: tuple[int | None, ...] = (None,),
        token_budget: int,
        max_num_seqs: int,
        max_context_len: int,
        max_sample_rows: int,
        policy: str | Policy = "splitfuse",
        prefix_caching: bool = True,
        watermark_blocks: int | None = None,
        max_bypasses: int = 16,
        prefix_salt: bytes = b"",
        promise: Promise | None = None,
        clock: abc.Callable[[], float] = time.monotonic,
        step_sizes: tuple[int, ...] = (),
        chunk_size: int | None = None,
    ) -> None:
        for name, value, lowest in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("token_budget", token_budget, 1),
            ("max_num_seqs", max_num_seqs, 1),
            ("max_context_len", max_context_len, 2),
            ("max_sample_rows", max_sample_rows, 1),
            ("max_bypasses", max_bypasses, 0),
            ("watermark_blocks", watermark_blocks, 0),
        ):
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}; it must be at least {lowest}; raise it")
        policy = checked_policy(policy)
        if isinstance(policy, str) and (policy in NEED_PROMISE) != (promise is not None):
            raise ValueError(
                f"policy is {policy!r} and promise is {promise}; set a promise with policy "
                f"{', '.join(map(repr, sorted(NEED_PROMISE)))}, and with no other"
            )
        if not windows or any(window is not None and window < 1 for window in windows):
            raise ValueError(f"windows is {windows}; it needs one entry for each cache group, None or at least 1")
        if chunk_size is not None:
            check_size(chunk_size, block_size=block_size, token_budget=token_budget, max_num_seqs=max_num_seqs)
            if policy in NEED_PROMISE:
                raise ValueError(
                    f"chunk_size={chunk_size} with policy {policy!r}, which shortens chunks; choose 'splitfuse'"
                )
        self.max_context_len = max_context_len
        groups = BlockGroups(windows=windows, block_size=block_size, token_budget=token_budget)
        self.limits = StepLimits(
            token_budget=token_budget,
            max_num_seqs=max_num_seqs,
            max_sample_rows=max_sample_rows,
            block_size=block_size,
            groups=groups,
            watermark_blocks=-(-num_blocks // 100) if watermark_blocks is None else watermark_blocks,
            max_bypasses=max_bypasses,
            chunk_size=chunk_size,
        )
        self.stats = SchedulerStats()
        self._pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching, salt=prefix_salt)
        self._state = SchedulerState(self._pool, groups, max_num_seqs=max_num_seqs, stats=self.stats)
        self._borrowed: list[int] = []  # blocks held outside of any request, once for each time they are held
        self._policy = POLICIES[policy] if isinstance(policy, str) else CheckedPolicy(policy)
        unit = 1 if chunk_size is None else chunk_size // block_size
        self._cached_prefix = partial(cached_prefix, pool=self._pool, groups=groups, unit=unit)
        self._clock = clock
        self._pace = Pace(promise, clock, step_sizes) if promise else None
        self._steps_in_flight: deque[Step] = deque()
        self._refused: list[Sequence] = []
        self._num_added = 0
        self._first_held: int | None = None  # sequences added as number this or later do not run

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._state.waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._state.running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._state.unfinished)

    @property
    def is_held(self) -> bool:
        """Whether `hold` was called and `release` was not."""
        return self._first_held is not None

    @property
    def is_paused(self) -> bool:
        """Whether nothing may run: every unfinished sequence is held."""
        first = self._first_held
        return first is not None and all(sequence.order[2] >= first for sequence in self._state.unfinished.values())

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner, including those kept for their content."""
        return self._pool.num_free

    # Requests

    def add(self, request: Request) -> Sequence:
        """Adds a request to the queue.

        Raises:
            ValueError: it can never run here, or its id is in use. Nothing has changed then.
        """
        if request.request_id in self._state.unfinished:
            raise ValueError(f"request_id {request.request_id!r} is already in use; use a unique id for each request")
        sequence = self._new_sequence(request)
        self._num_added += 1
        self._state.add(sequence)
        return sequence

    def estimate_wait(self, request: Request) -> int:
        """Estimates how many steps after being added the request would have its first token.

        Raises:
            ValueError: the request can never run here.
        """
        sequence, state = self._new_sequence(request), self._state
        ahead = state.waiting[: bisect_left(state.waiting, sequence.order, key=ORDER)]
        return steps_until_first_token(
            sequence, state.running, ahead, limits=self.limits, num_free_blocks=self._pool.num_free
        )

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence now, for a reason found above the scheduler, such as a stop string.

        Its blocks are free immediately, and tokens in flight are dropped. If the sequence has just ended by itself,
        only the reason changes.

        Raises:
            ValueError: `reason` is not one of `FinishReason`.
        """
        if reason not in get_args(FinishReason):
            raise ValueError(f"reason is {reason!r}; choose one of {', '.join(map(repr, get_args(FinishReason)))}")
        sequence.finish_reason = reason
        if sequence.status is not SequenceStatus.FINISHED:
            self._state.retire([sequence])

    def abort(self, request_id: str) -> bool:
        """Ends a request now with reason "abort"; False if there is no unfinished request with this id."""
        sequence = self._state.unfinished.get(request_id)
        if sequence is None:
            return False
        self.finish(sequence, "abort")
        return True

    def take_refused(self) -> list[Sequence]:
        """The sequences refused since the last call: ended with reason "refused", without a token."""
        refused, self._refused = self._refused, []
        return refused

    def start_over(self, unfinished: abc.Iterable[tuple[Sequence, int]]) -> None:
        """Keeps only these sequences, each with the given number of output tokens, and puts them back into the queue.

        Correct whatever the state was before: use it when the device's memory was lost, or after an exception in the
        middle of a change. All blocks are blank then, and no borrowed block has an owner.
        """
        self._steps_in_flight.clear()
        if self._pace:
            self._pace.forget_steps_in_flight()
        self._refused = []
        self._borrowed.clear()
        self._state.start_over(unfinished)

    # Pauses

    def hold(self, *, only_new: bool) -> None:
        """From now on `schedule` runs no sequence or, with `only_new`, none that is added from now on, until `release`."""
        self._first_held = self._num_added if only_new else 0

    def release(self) -> None:
        """Ends the effect of `hold`."""
        self._first_held = None

    def score_prompts_again(self) -> list[Sequence]:
        """Makes sequences whose prompt log-probabilities are incomplete compute all of them again; returns these.

        Call it while no step is in flight.
        """
        state, again = self._state, []
        for sequence in state.unfinished.values():
            if sequence.output_token_ids or sequence.first_prompt_row == sequence.num_prompt_tokens:
                continue
            if sequence.slot is not None:
                state.preempt(sequence)
            sequence.next_prompt_row = sequence.first_prompt_row
            again.append(sequence)
        return again

    # Steps

    def schedule(self) -> Step | None:
        """Returns the next step; None if there is no work, or if a step in flight must be committed first.

        Raises:
            RuntimeError: no sequence can run. Either too many blocks are borrowed, or the policy is wrong.
        """
        state = self._state
        if not state.unfinished:
            return None
        waiting = state.waiting
        if self._first_held is not None:
            if self.is_paused:
                return None
            waiting = [sequence for sequence in waiting if sequence.order[2] < self._first_held]
        plan = self._policy(
            Planner(
                state.running,
                waiting,
                limits=self.limits,
                blocks=BlockLedger(self._pool),
                cached_prefix=self._cached_prefix,
                now=self._clock,
                pace=self._pace,
            )
        )
        if plan.refused:
            self._refused += plan.refused
            for sequence in plan.refused:
                self.finish(sequence, "refused")
            if not state.unfinished:
                return None
        if not plan.chunks:
            if self._steps_in_flight:
                return None
            raise RuntimeError(self._why_nothing_runs())
        step = self._carry_out(plan)
        self._steps_in_flight.append(step)
        if self._pace:
            self._pace.dispatched()
        return step

    def _carry_out(self, plan: StepPlan) -> Step:
        """Does what the plan says: preempts, admits, allocates blocks, and counts the tokens as computed."""
        state, stats, chunks = self._state, self.stats, plan.chunks
        for sequence in plan.preempted:
            state.preempt(sequence)
        for sequence in plan.bypassed:
            sequence.num_bypasses += 1
        stats.num_bypasses += len(plan.bypassed)
        admitted = state.admit(plan.admissions) if plan.admissions else []

        num_tokens = num_rows = len(chunks)  # most have one token and one row
        updates: list[tuple[int, int, list[int]]] = []
        sampled: list[Sequence] = []
        fresh = set(admitted) if admitted else admitted
        for sequence, start, length, rows, samples in chunks:
            stop = start + length
            if stop > sequence.capacity:
                # A sequence starts at a block boundary, so its first chunk always comes here, where all is new.
                updates += state.extend(sequence, stop, whole_table=sequence in fresh)
            sequence.num_computed = stop
            if length > 1:
                num_tokens += length - 1
            if rows != 1:
                num_rows += rows - 1
            if samples:
                sequence.num_tokens = stop + 1
                sampled.append(sequence)
            if stop >= sequence.next_block_end:
                register_blocks(sequence, state.pool)
            if stop > sequence.next_prompt_row < sequence.num_prompt_tokens:
                sequence.next_prompt_row = min(stop, sequence.num_prompt_tokens)
        if state.groups.is_windowed:
            state.free_behind_windows(chunks)
        stats.num_steps += 1
        stats.num_tokens += num_tokens
        return Step(chunks, sampled, updates, admitted, plan.preempted, num_tokens, num_rows)

    def _why_nothing_runs(self) -> str:
        pool = self._pool
        if self._borrowed:
            return (
                f"{len(self._borrowed)} of {pool.num_blocks} blocks are borrowed, and the {pool.num_free} free ones "
                f"are not enough for any of {self.num_running + self.num_waiting} requests; return some"
            )
        return (
            f"the policy planned nothing for {self.num_running} running and {self.num_waiting} waiting sequences "
            f"with {pool.num_free} of {pool.num_blocks} blocks free; this is a bug in the policy"
        )

    def commit(self, step: Step, token_ids: abc.Sequence[int]) -> list[Sequence]:
        """Records what the oldest step in flight sampled: a token id for each of `step.sampled`, in order.

        Returns the sequences that advanced by a token; `finish_reason` says which of them are done. Tokens of
        sequences that ended in the meantime are dropped.

        Raises:
            ValueError: the step is not the oldest in flight, or the number of tokens is wrong. Nothing has
                changed then.
        """
        sampled = step.sampled
        if not self._steps_in_flight or self._steps_in_flight[0] is not step:
            raise ValueError(
                f"the step is not the oldest of the {len(self._steps_in_flight)} in flight; "
                "commit every step once, in the order of schedule()"
            )
        if len(token_ids) != len(sampled):
            raise ValueError(
                f"token_ids has {len(token_ids)} entries but the step samples {len(sampled)} tokens; "
                "pass one for each of step.sampled"
            )
        self._steps_in_flight.popleft()
        if self._pace:
            self._pace.committed(step.num_tokens)
        advanced: list[Sequence] = []
        finished: list[Sequence] = []
        for sequence, token_id in zip(sampled, token_ids):  # noqa: B905 (the lengths are equal, and this loop is hot)
            if sequence.finish_reason is not None:
                continue
            advanced.append(sequence)
            output = sequence.output_token_ids
            output.append(token_id)
            if token_id in sequence.stop_ids and len(output) > sequence.min_new_tokens:
                sequence.finish_reason = "stop"
                finished.append(sequence)
            elif len(output) == sequence.max_new_tokens:
                sequence.finish_reason = "length"
                finished.append(sequence)
            if sequence.num_computed >= sequence.next_block_end:  # never without a prefix cache
                register_blocks(sequence, self._pool)
        if finished:
            self._state.retire(finished)
        return advanced

    def steady_run(self) -> SteadyRun | None:
        """The steps that `skip` may skip, because nothing is decided in them; None if the next step decides something.

        One step may be in flight, if it too computes one token of each running sequence.
        """
        in_flight, running = self._steps_in_flight, self._state.running
        if self._state.waiting or self._pace or len(in_flight) > 1:
            return None
        if in_flight and (in_flight[0].sampled != running or in_flight[0].num_tokens != len(running)):
            return None
        return steady_run(running, self.limits, self._pool, in_flight=bool(in_flight))

    def skip(self, num_steps: int, token_ids: abc.Iterable[int]) -> Step | None:
        """Has the effect of `num_steps` calls of `schedule()` and `commit()`, within `steady_run()`, at the cost of one.

        For simulations. Every sequence gets the same `num_steps` token ids. Returns the step that is now in flight, if
        one was before.
        """
        running = self._state.running
        advance(running, num_steps, token_ids, self._pool)
        self.stats.num_steps += num_steps
        self.stats.num_tokens += num_steps * len(running)
        if not self._steps_in_flight:
            return None
        chunks = [Chunk(sequence, sequence.num_computed - 1, 1, 1, True) for sequence in running]
        step = Step(chunks, self._steps_in_flight.pop().sampled, [], [], [], len(chunks), len(chunks))
        self._steps_in_flight.append(step)
        return step

    # KV blocks outside of requests

    def borrow_blocks(self, count: int) -> list[int]:
        """Removes `count` blocks from scheduling, for a caller that fills them itself; RuntimeError if fewer are free."""
        blocks = self._pool.allocate(count)
        self._borrowed += blocks
        return blocks

    def share_blocks(self, block_ids: abc.Sequence[int]) -> None:
        """Lends borrowed blocks once more, so that they must be returned once more."""
        self._pool.share(block_ids)
        self._borrowed += block_ids

    def return_blocks(self, block_ids: abc.Sequence[int]) -> None:
        """Returns borrowed blocks."""
        for block_id in block_ids:
            self._borrowed.remove(block_id)
        self._pool.free(block_ids)

    def num_owners(self, block_id: int) -> int:
        """How many times a block is held."""
        return self._pool.num_owners(block_id)

    def settle_blocks(self, borrowed: abc.Iterable[int]) -> None:
        """After an interrupt: makes exactly these blocks borrowed, however far borrowing or returning had progressed."""
        self._borrowed = list(borrowed)
        self._pool.settle([*(sequence.block_ids for sequence in self._state.running), self._borrowed])

    def reset_prefix_cache(self) -> None:
        """Drops every cached prefix: no later request finds one computed before this call. Running sequences continue."""
        self._pool.forget_contents()
        for sequence in self._state.running:  # its later blocks continue earlier ones that are dropped
            sequence.next_block_end = sequence.max_total_tokens + 1

    def check_integrity(self) -> None:
        """Checks the bookkeeping for contradictions, in linear time; for tests.

        Raises:
            RuntimeError: the first contradiction found.
        """
        check_state(self._state, borrowed=self._borrowed)

    def _new_sequence(self, request: Request) -> Sequence:
        pool = self._pool
        limit = max_total_tokens(
            request, max_context_len=self.max_context_len, num_blocks=pool.num_blocks, groups=self.limits.groups
        )
        order = (request.priority, request.arrival_time, self._num_added)
        sequence = Sequence(request, max_total_tokens=limit, order=order)
        sequence.next_block_end = pool.block_size if pool.prefix_caching else limit + 1
        if self.limits.chunk_size is not None:
            sequence.num_shareable = num_shareable(sequence, self.limits.chunk_size)
        return sequence
