"""The scheduler: the one owner of queues, slots and blocks."""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections import abc, deque
from functools import partial
from operator import attrgetter
from typing import get_args

from fastgen_jax.scheduling.block_pool import BlockLedger, BlockPool
from fastgen_jax.scheduling.estimate import steps_until_first_token
from fastgen_jax.scheduling.integrity import check_books
from fastgen_jax.scheduling.limits import max_total_tokens
from fastgen_jax.scheduling.pace import Pace, Promise
from fastgen_jax.scheduling.plan import Admission, StepLimits
from fastgen_jax.scheduling.plan_check import CheckedPolicy, checked_policy
from fastgen_jax.scheduling.policies import NEED_PROMISE, POLICIES, Policy
from fastgen_jax.scheduling.prefix import cached_prefix, register_blocks
from fastgen_jax.scheduling.request import Request
from fastgen_jax.scheduling.sequence import FinishReason, Sequence, SequenceStatus
from fastgen_jax.scheduling.steady import SteadyRun, advance, steady_run
from fastgen_jax.scheduling.step import Chunk, SchedulerStats, Step

_FINISHED = SequenceStatus.FINISHED
_RUNNING = SequenceStatus.RUNNING
_WAITING = SequenceStatus.WAITING
_ORDER = attrgetter("order")


class Scheduler:
    """Decides what each step computes, and keeps the books of tokens, slots and KV blocks.

    `add` a request; then, as long as there is work, `schedule()` a step, run it, and `commit` what it
    sampled. `schedule()` may be called again before the commit: sequences then run on tokens that are still
    on the device. Every step that `schedule()` returns must be run, in order, and committed, in order.

    A sequence is preempted by recomputation: it loses its blocks, keeps its tokens, and waits at its old
    place in line. Slots and blocks of a sequence that ended or was preempted are free at once: the device
    runs steps in order, so a late write of an earlier step comes before any write of a later one.

    Args:
        num_blocks: KV blocks in the pool, of `block_size` tokens each.
        token_budget: tokens a step can hold.
        max_num_seqs: sequences that can run at a time.
        max_context_len: longest sequence in tokens, prompt and generated.
        max_sample_rows: logit rows a step can compute.
        policy: a key of `POLICIES`, or a function with the signature of `Policy`, whose plans are checked.
        prefix_caching: whether full blocks are kept and shared.
        watermark_blocks: blocks that stay free when a sequence is admitted; None for 1 % of the pool.
        max_bypasses: how many later sequences may overtake one for which there is no room.
        prefix_salt: distinguishes the digests of pools with different contents.
        promise: what a policy in `NEED_PROMISE` promises; None for the others.
        clock: seconds on the clock of the requests' arrival times; read only for the sake of a promise.
        step_sizes: the sizes in tokens to which steps are padded, ascending; empty if they are not.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
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
                f"policy is {policy!r} and promise is {promise}; give a promise with "
                f"{', '.join(map(repr, sorted(NEED_PROMISE)))}, and only there"
            )
        self.max_context_len = max_context_len
        self.limits = StepLimits(
            token_budget=token_budget,
            max_num_seqs=max_num_seqs,
            max_sample_rows=max_sample_rows,
            block_size=block_size,
            watermark_blocks=-(-num_blocks // 100) if watermark_blocks is None else watermark_blocks,
            max_bypasses=max_bypasses,
        )
        self.stats = SchedulerStats()
        self._borrowed: list[int] = []
        self._policy = POLICIES[policy] if isinstance(policy, str) else CheckedPolicy(policy)
        self._pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching, salt=prefix_salt)
        self._waiting: list[Sequence] = []  # both in ascending order
        self._running: list[Sequence] = []
        self._unfinished: dict[str, Sequence] = {}
        self._free_slots = list(range(max_num_seqs))  # a heap: the lowest slot is given first
        self._steps_in_flight: deque[Step] = deque()
        self._pace = Pace(promise, clock, step_sizes) if promise else None
        self._dispatch_times: deque[float] = deque()  # of the steps in flight, where there is a pace
        self._last_commit = 0.0
        self._refused: list[Sequence] = []
        self._num_added = 0
        self._cached_prefix = partial(cached_prefix, pool=self._pool)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._unfinished)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, including those kept for their content."""
        return self._pool.num_free

    def borrow_blocks(self, count: int) -> list[int]:
        """Takes `count` blocks out of scheduling, for a caller that fills them itself; RuntimeError if none are left."""
        blocks = self._pool.allocate(count)
        self._borrowed += blocks
        return blocks

    def share_blocks(self, block_ids: abc.Sequence[int]) -> None:
        """Lends borrowed blocks once more, so that they must be returned once more."""
        self._pool.share(block_ids)
        self._borrowed += block_ids

    def num_owners(self, block_id: int) -> int:
        """How many times a block is held."""
        return self._pool.num_owners(block_id)

    def settle_blocks(self, borrowed: abc.Iterable[int]) -> None:
        """After an interrupt: these blocks are borrowed, and no others, however far borrowing or returning had come."""
        self._borrowed = list(borrowed)
        self._pool.settle([*(sequence.block_ids for sequence in self._running), self._borrowed])

    def reset_prefix_cache(self) -> None:
        """Nobody finds a prefix any more that was computed before this call. Running sequences go on undisturbed."""
        self._pool.forget_contents()
        for sequence in self._running:  # its later blocks stand behind earlier ones that are forgotten
            sequence.next_block_end = sequence.max_total_tokens + 1

    def return_blocks(self, block_ids: abc.Sequence[int]) -> None:
        """Gives borrowed blocks back."""
        for block_id in block_ids:
            self._borrowed.remove(block_id)
        self._pool.free(block_ids)

    def add(self, request: Request) -> Sequence:
        """Puts a request in line.

        Raises:
            ValueError: it can never run here, or its id is in use. Nothing has changed then.
        """
        if request.request_id in self._unfinished:
            raise ValueError(f"request_id {request.request_id!r} is already in use; give each request its own")
        sequence = self._new_sequence(request)
        self._num_added += 1
        self._unfinished[request.request_id] = sequence
        insort(self._waiting, sequence, key=_ORDER)
        return sequence

    def schedule(self) -> Step | None:
        """Gives the next step; None if there is no work, or if a step in flight must be committed first."""
        if not self._unfinished:
            return None
        pool = self._pool
        plan = self._policy(
            self._running,
            self._waiting,
            limits=self.limits,
            blocks=BlockLedger(pool),
            cached_prefix=self._cached_prefix,
            pace=self._pace,
        )
        chunks = plan.chunks
        if plan.refused:
            self._refused += plan.refused
            for sequence in plan.refused:
                self.finish(sequence, "refused")
            if not self._unfinished:
                return None
        if not chunks:
            if not self._steps_in_flight and self._borrowed:
                raise RuntimeError(
                    f"{len(self._borrowed)} of {pool.num_blocks} blocks are borrowed, and the {pool.num_free} free ones "
                    f"do not suffice for any of {self.num_running + self.num_waiting} requests; give some back"
                )
            if not self._steps_in_flight:
                raise RuntimeError(
                    f"the policy planned nothing for {self.num_running} running and {self.num_waiting} "
                    f"waiting sequences with {pool.num_free} of {pool.num_blocks} blocks free; "
                    "this is a defect of the policy"
                )
            return None
        for sequence in plan.preempted:
            self._preempt(sequence)
        for sequence in plan.bypassed:
            sequence.num_bypasses += 1
        self.stats.num_bypasses += len(plan.bypassed)
        admitted = self._admit(plan.admissions) if plan.admissions else []

        num_tokens = num_rows = len(chunks)  # most have one token and one row
        updates: list[tuple[int, int, list[int]]] = []
        sampled: list[Sequence] = []
        fresh = set(admitted) if admitted else admitted
        for sequence, start, length, rows, samples in chunks:
            stop = start + length
            if stop > sequence.capacity:
                # A sequence starts at a block border, so its first chunk always comes here: all is new then.
                updates.append(self._extend(sequence, stop, whole_table=sequence in fresh))
            sequence.num_computed = stop
            if length > 1:
                num_tokens += length - 1
            if rows != 1:
                num_rows += rows - 1
            if samples:
                sequence.num_tokens = stop + 1
                sampled.append(sequence)
            if stop >= sequence.next_block_end:
                register_blocks(sequence, pool)
            if stop > sequence.next_prompt_row < sequence.num_prompt_tokens:
                sequence.next_prompt_row = min(stop, sequence.num_prompt_tokens)
        self.stats.num_steps += 1
        self.stats.num_tokens += num_tokens
        step = Step(chunks, sampled, updates, admitted, plan.preempted, num_tokens, num_rows)
        self._steps_in_flight.append(step)
        if self._pace:
            self._dispatch_times.append(self._pace.now())
        return step

    def take_refused(self) -> list[Sequence]:
        """The sequences refused since the last call: ended with reason "refused", without a token."""
        refused, self._refused = self._refused, []
        return refused

    def commit(self, step: Step, token_ids: abc.Sequence[int]) -> list[Sequence]:
        """Takes in what the oldest step in flight sampled: a token id for each of `step.sampled`, in order.

        Gives the sequences that advanced by a token; `finish_reason` tells which of them are done. Tokens of
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
                "give one for each of step.sampled"
            )
        self._steps_in_flight.popleft()
        if self._pace:
            now = self._pace.now()
            self._pace.observe(step.num_tokens, now - max(self._last_commit, self._dispatch_times.popleft()))
            self._last_commit = now
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
            self._retire(finished)
        return advanced

    def steady_run(self) -> SteadyRun | None:
        """The steps that could be skipped by `skip`, because nothing is decided in them; None if the next is no such step.

        There may be one step in flight, if it too is one token of each running sequence.
        """
        in_flight = self._steps_in_flight
        if self._waiting or self._pace or len(in_flight) > 1:
            return None
        if in_flight and (in_flight[0].sampled != self._running or in_flight[0].num_tokens != len(self._running)):
            return None
        return steady_run(self._running, self.limits, self._pool, in_flight=bool(in_flight))

    def skip(self, num_steps: int, token_ids: abc.Iterable[int]) -> Step | None:
        """As `num_steps` times `schedule()` and `commit()`, within `steady_run()`, at the price of one: for simulations.

        Every sequence gets the same `num_steps` token ids. Gives the step that is now in flight, if one was before.
        """
        running = self._running
        advance(running, num_steps, token_ids, self._pool)
        self.stats.num_steps += num_steps
        self.stats.num_tokens += num_steps * len(running)
        if not self._steps_in_flight:
            return None
        chunks = [Chunk(sequence, sequence.num_computed - 1, 1, 1, True) for sequence in running]
        step = Step(chunks, self._steps_in_flight.pop().sampled, [], [], [], len(chunks), len(chunks))
        self._steps_in_flight.append(step)
        return step

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence now, for a reason found above the scheduler, such as a stop string.

        Its blocks are free at once, and tokens in flight are dropped. If the sequence has just ended by
        itself, only the reason changes.

        Raises:
            ValueError: `reason` is not one of `FinishReason`.
        """
        if reason not in get_args(FinishReason):
            raise ValueError(f"reason is {reason!r}; choose one of {', '.join(map(repr, get_args(FinishReason)))}")
        sequence.finish_reason = reason
        if sequence.status is not _FINISHED:
            self._retire([sequence])

    def abort(self, request_id: str) -> bool:
        """Ends a request now with reason "abort"; False if there is no unfinished request of this id."""
        sequence = self._unfinished.get(request_id)
        if sequence is None:
            return False
        self.finish(sequence, "abort")
        return True

    def start_over(self, unfinished: abc.Iterable[tuple[Sequence, int]]) -> None:
        """Forgets everything but these sequences, each with so many of its output tokens, and puts them in line again.

        Right in whatever state the books are: for when the device's memory was lost, and for when an exception came in
        the middle of a change. All blocks are blank then; borrowed ones are no longer anybody's.
        """
        self._steps_in_flight.clear()
        self._dispatch_times.clear()
        self._refused = []
        self._borrowed.clear()
        self._pool.reset()
        sequences = []
        for sequence, num_output_tokens in unfinished:
            self.stats.num_preemptions += sequence.slot is not None
            sequence.restart(num_output_tokens)
            sequences.append(sequence)
        self._free_slots = list(range(self.limits.max_num_seqs))
        self._running = []
        self._waiting = sorted(sequences, key=_ORDER)
        self._unfinished = {sequence.request_id: sequence for sequence in sequences}

    def estimate_wait(self, request: Request) -> int:
        """Estimates how many steps after being added the request would have its first token.

        Raises:
            ValueError: the request can never run here.
        """
        sequence = self._new_sequence(request)
        ahead = self._waiting[: bisect_left(self._waiting, sequence.order, key=_ORDER)]
        return steps_until_first_token(
            sequence, self._running, ahead, limits=self.limits, num_free_blocks=self._pool.num_free
        )

    def check_integrity(self) -> None:
        """Checks the books against each other, in time linear in everything there is; for tests.

        Raises:
            RuntimeError: the first contradiction found.
        """
        check_books(
            running=self._running,
            waiting=self._waiting,
            unfinished=self._unfinished,
            free_slots=self._free_slots,
            borrowed=self._borrowed,
            pool=self._pool,
            max_num_seqs=self.limits.max_num_seqs,
        )

    def _new_sequence(self, request: Request) -> Sequence:
        pool = self._pool
        limit = max_total_tokens(
            request, max_context_len=self.max_context_len, num_blocks=pool.num_blocks, block_size=pool.block_size
        )
        order = (request.priority, request.arrival_time, self._num_added)
        sequence = Sequence(request, max_total_tokens=limit, order=order)
        sequence.next_block_end = pool.block_size if pool.prefix_caching else limit + 1
        return sequence

    def _admit(self, admissions: list[Admission]) -> list[Sequence]:
        # All cached blocks are taken before the first is allocated, because allocating may evict them.
        for sequence, cached in admissions:
            self._pool.share(cached)
            self._remove(self._waiting, sequence)
            insort(self._running, sequence, key=_ORDER)
            sequence.status = _RUNNING
            sequence.slot = heapq.heappop(self._free_slots)
            sequence.block_ids = list(cached)
            sequence.capacity = sequence.num_computed = len(cached) * self.limits.block_size
            if self._pool.prefix_caching:
                sequence.next_block_end = sequence.capacity + self.limits.block_size
            if not sequence.num_preemptions:
                sequence.num_cached = sequence.capacity
            self.stats.num_prefix_hit_tokens += sequence.capacity
        return [admission.sequence for admission in admissions]

    def _extend(self, sequence: Sequence, stop: int, *, whole_table: bool) -> tuple[int, int, list[int]]:
        """Allocates blocks up to position `stop`; gives the update of its block table."""
        table, size = sequence.block_ids, self.limits.block_size
        first = 0 if whole_table else len(table)
        table += self._pool.allocate(-(-stop // size) - len(table))
        sequence.capacity = len(table) * size
        assert sequence.slot is not None
        return sequence.slot, first, table[first:]

    def _preempt(self, sequence: Sequence) -> None:
        self._remove(self._running, sequence)
        self._release(sequence)
        sequence.status = _WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        insort(self._waiting, sequence, key=_ORDER)

    def _retire(self, finished: list[Sequence]) -> None:
        """Removes sequences that have a finish reason from all books."""
        for sequence in finished:
            if sequence.status is _WAITING:
                self._remove(self._waiting, sequence)
            else:
                self._remove(self._running, sequence)
                self._release(sequence)
            sequence.status = _FINISHED
            del self._unfinished[sequence.request_id]

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        heapq.heappush(self._free_slots, sequence.slot)
        self._pool.free(sequence.block_ids)
        sequence.slot = None
        sequence.block_ids = []
        sequence.capacity = 0

    @staticmethod
    def _remove(queue: list[Sequence], sequence: Sequence) -> None:
        del queue[bisect_left(queue, sequence.order, key=_ORDER)]
