"""The queues, slots and KV blocks of all unfinished sequences, and the operations that change them."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import abc
from operator import attrgetter

from fastgen_jax.scheduling.block_pool import BlockPool
from fastgen_jax.scheduling.groups import BlockGroups
from fastgen_jax.scheduling.plan import Admission
from fastgen_jax.scheduling.prefix import Prefix
from fastgen_jax.scheduling.sequence import Sequence, SequenceStatus
from fastgen_jax.scheduling.step import Chunk, SchedulerStats

ORDER = attrgetter("order")
_FINISHED = SequenceStatus.FINISHED
_RUNNING = SequenceStatus.RUNNING
_WAITING = SequenceStatus.WAITING


class SchedulerState:
    """Which sequences wait and run, and which slots and blocks they hold. Only `Scheduler` changes it.

    A sequence is preempted by recomputation: it loses its blocks, keeps its tokens, and waits at its old place in the
    queue. Slots and blocks of a sequence that ended or was preempted are free immediately: the device runs steps in
    order, so a late write of an earlier step comes before any write of a later one.
    """

    def __init__(self, pool: BlockPool, groups: BlockGroups, *, max_num_seqs: int, stats: SchedulerStats) -> None:
        self.pool = pool
        self.groups = groups
        self.stats = stats
        self.max_num_seqs = max_num_seqs
        self.waiting: list[Sequence] = []
        """Sequences without a slot, in ascending order of `Sequence.order`."""
        self.running: list[Sequence] = []
        """Sequences with a slot, in the same order."""
        self.unfinished: dict[str, Sequence] = {}
        """All of them by request id."""
        self.free_slots = list(range(max_num_seqs))
        """A heap: the lowest slot is assigned first."""

    # Requests

    def add(self, sequence: Sequence) -> None:
        """Adds a new sequence to the queue."""
        self.unfinished[sequence.request_id] = sequence
        insort(self.waiting, sequence, key=ORDER)

    def retire(self, finished: abc.Iterable[Sequence]) -> None:
        """Removes sequences that have a finish reason, wherever they are."""
        for sequence in finished:
            if sequence.status is _WAITING:
                self._remove(self.waiting, sequence)
            else:
                self._remove(self.running, sequence)
                self._release(sequence)
            sequence.status = _FINISHED
            del self.unfinished[sequence.request_id]

    def start_over(self, unfinished: abc.Iterable[tuple[Sequence, int]]) -> None:
        """Keeps only these sequences, each with the given number of output tokens, all waiting. All blocks are blank.

        Correct whatever the state was before, so it also recovers from an exception in the middle of a change.
        """
        self.pool.reset()
        sequences = []
        for sequence, num_output_tokens in unfinished:
            self.stats.num_preemptions += sequence.slot is not None
            sequence.restart(num_output_tokens)
            sequences.append(sequence)
        self.free_slots = list(range(self.max_num_seqs))
        self.running = []
        self.waiting = sorted(sequences, key=ORDER)
        self.unfinished = {sequence.request_id: sequence for sequence in sequences}

    # Slots and blocks

    def admit(self, admissions: abc.Iterable[Admission]) -> list[Sequence]:
        """Gives waiting sequences a slot and the cached blocks that they start after; returns them."""
        size, caching, windowed = self.pool.block_size, self.pool.prefix_caching, self.groups.is_windowed
        admitted = []
        # All cached blocks are shared before the first one is allocated, because allocating may evict them.
        for sequence, cached in admissions:
            self.pool.share(cached.block_ids)
            self._remove(self.waiting, sequence)
            insort(self.running, sequence, key=ORDER)
            sequence.status = _RUNNING
            sequence.slot = heapq.heappop(self.free_slots)
            sequence.tables, sequence.num_freed = self._tables_of(cached)
            sequence.capacity = sequence.num_computed = cached.num_blocks * size
            if windowed:
                sequence.next_free = self._next_free(sequence)
            if caching:
                sequence.next_block_end = sequence.capacity + size
            if not sequence.num_preemptions:
                sequence.num_cached = sequence.capacity
            self.stats.num_prefix_hit_tokens += sequence.capacity
            admitted.append(sequence)
        return admitted

    def extend(self, sequence: Sequence, stop: int, *, whole_table: bool) -> list[tuple[int, int, list[int]]]:
        """Allocates blocks up to position `stop`; returns the updates of its block tables, as in `Step`."""
        size, row = self.pool.block_size, sequence.slot
        assert row is not None
        num_blocks, updates = -(-stop // size), []
        for table, freed in zip(sequence.tables, sequence.num_freed, strict=True):
            first = freed if whole_table else len(table)
            table += self.pool.allocate(num_blocks - len(table))
            updates.append((row, first, table[first:]))
            row += self.max_num_seqs
        sequence.capacity = num_blocks * size
        return updates

    def free_behind_windows(self, chunks: abc.Iterable[Chunk]) -> None:
        """Frees the blocks of windowed groups that are not kept after these chunks.

        The next step may write to them: the device runs steps in order. Those with generated tokens leave the prefix cache:
        few prompts end within an answer and go on differently, and for them blocks of more use would be evicted.
        """
        windows, first_block = self.groups.windows, self.groups.first_block
        for sequence, *_ in chunks:
            if sequence.num_computed < sequence.next_free:
                continue
            num_prompt_blocks = sequence.num_prompt_tokens // self.pool.block_size
            for group, window in enumerate(windows):
                freed, first = sequence.num_freed[group], first_block(window, sequence.num_computed)
                if first > freed:
                    kept = min(first, max(freed, num_prompt_blocks))
                    table = sequence.tables[group]
                    self.pool.free(table[freed:kept])
                    self.pool.discard(table[kept:first])
                    sequence.num_freed[group] = first
            sequence.next_free = self._next_free(sequence)

    def _next_free(self, sequence: Sequence) -> int:
        """With how many computed positions the next block of a windowed group can be freed."""
        size, freed, windows = self.pool.block_size, sequence.num_freed, self.groups.windows
        blocks = min(n + (w + size - 2) // size for n, w in zip(freed, windows, strict=True) if w is not None)
        return size * (blocks + 1)

    def _tables_of(self, cached: Prefix) -> tuple[list[list[int]], list[int]]:
        """Tables that begin with cached blocks, and how many of their entries have no meaning."""
        if not cached.num_blocks:
            return [[] for _ in self.groups.windows], [0] * self.groups.num_groups
        freed = [cached.num_blocks - len(table) for table in cached.tables]
        return [[0] * n + table for n, table in zip(freed, cached.tables, strict=True)], freed

    def preempt(self, sequence: Sequence) -> None:
        """Takes slot and blocks from a running sequence, which then waits."""
        self._remove(self.running, sequence)
        self._release(sequence)
        sequence.status = _WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        insort(self.waiting, sequence, key=ORDER)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        heapq.heappush(self.free_slots, sequence.slot)
        self.pool.free(sequence.block_ids)
        sequence.slot = None
        sequence.forget_blocks()

    @staticmethod
    def _remove(queue: list[Sequence], sequence: Sequence) -> None:
        del queue[bisect_left(queue, sequence.order, key=ORDER)]
