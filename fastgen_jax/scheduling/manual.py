"""Sequences whose tokens a caller chooses, in addition to those of requests: no policy plans them, nothing is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Ordered
from typing import NamedTuple

from fastgen_jax.scheduling.request import Request, SamplingParams
from fastgen_jax.scheduling.scheduler import Scheduler
from fastgen_jax.scheduling.sequence import Sequence
from fastgen_jax.scheduling.step import Chunk, Step


class ManualSequence(NamedTuple):
    """A sequence between two calls: all of its tokens are computed and their keys and values are in its blocks.

    It has a block table for each cache group. Windowed groups keep all of their blocks, because it can be truncated.
    Without blocks none of the tokens is computed: the next call that extends the sequence starts at its first token.
    """

    token_ids: tuple[int, ...] = ()
    tables: tuple[tuple[int, ...], ...] = ()

    @property
    def block_ids(self) -> list[int]:
        """The blocks of all cache groups."""
        return [block_id for table in self.tables for block_id in table]


class ManualRow(NamedTuple):
    """A row of a step's results, and the token that it belongs to."""

    row: int
    sequence: Sequence
    position: int


class ManualSequences:
    """The caller's sequences by name. They take KV blocks from the scheduler's pool; `free` returns them.

    To extend sequences, `begin` them, run the steps that `steps` yields, and `keep` them.

    A change replaces the table in one assignment. An exception before that leaves the old table and one after it the new
    table; `settle` then frees the blocks that belong to no sequence.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.table: Mapping[str, ManualSequence] = {}
        """All of them, oldest first; replaced as a whole, never modified."""

    def __len__(self) -> int:
        return len(self.table)

    def get(self, name: str) -> ManualSequence:
        """The sequence with that name; an empty one if there is none."""
        return self.table.get(name, ManualSequence())

    def existing(self, name: str) -> ManualSequence:
        """The sequence with that name; ValueError if there is none."""
        if name not in self.table:
            raise ValueError(f"no sequence {name!r}; known: {', '.join(map(repr, self.table)) or 'none'}")
        return self.table[name]

    def room(self, name: str) -> int:
        """Tokens by which the sequence could grow now: bounded by the context limit and the free blocks."""
        sequence = self.get(name)
        num_free = self._scheduler.num_free_blocks // self._num_groups  # for each group
        num_blocks = len(sequence.block_ids) // self._num_groups + num_free - self._must_copy(sequence)
        limit = min(self._scheduler.max_context_len, num_blocks * self._block_size)
        return max(limit - len(sequence.token_ids), 0)

    def check_room(self, lengths: Mapping[str, int], *, temporary: bool = False) -> None:
        """ValueError unless all of these sequences together can grow by these lengths; `temporary` ones are new."""
        limit, num_blocks = self._scheduler.max_context_len, 0
        for name, length in lengths.items():
            sequence = ManualSequence() if temporary else self.get(name)
            total = len(sequence.token_ids) + length
            if total > limit:
                raise ValueError(f"sequence {name!r} would have {total} tokens but max_context_len is {limit}; flush it")
            num_blocks += (self._blocks_for(total) + self._must_copy(sequence)) * self._num_groups
            num_blocks -= len(sequence.block_ids)
        free = self._scheduler.num_free_blocks
        if num_blocks > free:
            raise ValueError(
                f"put needs {num_blocks} KV blocks and {free} are free; flush sequences or wait for requests to finish"
            )

    def begin(
        self, name: str, token_ids: tuple[int, ...], *, copy_block: Callable[[int, int], object], temporary: bool = False
    ) -> Sequence:
        """The sequence with `token_ids` still to compute and blocks for them; `check_room` first.

        If the next token belongs in a block that a fork shares, `copy_block(source, target)` copies it on the device. A
        `temporary` sequence is always a new one; return its blocks with `release`.
        """
        before = ManualSequence() if temporary else self.get(name)
        tokens, must_copy = before.token_ids + token_ids, self._must_copy(before)
        tables = [list(table) for table in before.tables or ((),) * self._num_groups]
        for table in tables:
            if must_copy:
                (copy,) = self._scheduler.borrow_blocks(1)
                copy_block(table[-1], copy)
                table[-1] = copy
            table += self._scheduler.borrow_blocks(self._blocks_for(len(tokens)) - len(table))
        request = Request(request_id=name, prompt_token_ids=tokens, params=SamplingParams(), seed=0)
        sequence = Sequence(request, max_total_tokens=len(tokens), order=(0, 0.0, 0))
        sequence.num_computed = len(before.token_ids) if before.tables else 0
        sequence.tables, sequence.num_freed = tables, [0] * len(tables)
        return sequence

    def steps(self, sequences: list[Sequence], *, last: int) -> Iterator[tuple[Step, list[ManualRow]]]:
        """The steps that compute what is missing, each with its rows: those of the last `last` positions of a sequence.

        Run each step before asking for the next one.
        """
        limits = self._scheduler.limits
        max_rows = min(limits.max_sample_rows, limits.max_num_seqs)
        pending = sequences
        while pending:
            chunks, updates, rows, remaining = [], [], [], []
            tokens_left = limits.token_budget
            for sequence in pending:
                start, total = sequence.num_computed, sequence.num_prompt_tokens
                first_row = max(start, total - last)
                stop = min(total, start + tokens_left, first_row + max_rows - len(rows))
                if stop <= start or len(chunks) == max_rows:
                    remaining.append(sequence)
                    continue
                sequence.slot = len(chunks)  # in this step only
                num_rows = max(0, stop - first_row)
                chunks.append(Chunk(sequence, start, stop - start, num_rows, False))
                for group, table in enumerate(sequence.tables):
                    updates.append((group * limits.max_num_seqs + sequence.slot, 0, table))
                rows += [ManualRow(len(rows) + i, sequence, stop - num_rows + i) for i in range(num_rows)]
                tokens_left -= stop - start
                sequence.num_computed = stop
                if stop < total:
                    remaining.append(sequence)
            step = Step(
                chunks=chunks,
                sampled=[],
                block_updates=updates,
                admitted=[],
                preempted=[],
                num_tokens=limits.token_budget - tokens_left,
                num_sample_rows=len(rows),
            )
            yield step, rows
            pending = remaining

    def keep(self, sequences: Ordered[Sequence]) -> None:
        """Stores sequences that `begin` returned and whose steps have run, in place of those of the same names."""
        before = [self.get(sequence.request_id) for sequence in sequences]
        after = [ManualSequence(s.request.prompt_token_ids, tuple(map(tuple, s.tables))) for s in sequences]
        self.table = {**self.table, **{s.request_id: new for s, new in zip(sequences, after, strict=True)}}
        for old, new in zip(before, after, strict=True):  # a shared block that has been copied
            tables = zip(old.tables, new.tables, strict=False)
            self._scheduler.return_blocks([a for o, n in tables for a, b in zip(o, n, strict=False) if a != b])

    def release(self, sequence: Sequence) -> None:
        """Returns the blocks of a temporary sequence to the pool."""
        self._scheduler.return_blocks(sequence.block_ids)

    def fork(self, name: str, new_name: str) -> None:
        """A new sequence with the tokens and the blocks of another; ValueError if its name is taken."""
        sequence = self.existing(name)
        if new_name in self.table:
            raise ValueError(f"sequence {new_name!r} already exists; choose another id, or flush it first")
        self._scheduler.share_blocks(sequence.block_ids)
        self.table = {**self.table, new_name: sequence}

    def truncate(self, name: str, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens, 1 or more, and the blocks that hold them."""
        sequence = self.existing(name)
        num_blocks = self._blocks_for(num_tokens)
        kept = tuple(table[:num_blocks] for table in sequence.tables)
        self.table = {**self.table, name: ManualSequence(sequence.token_ids[:num_tokens], kept)}
        self._scheduler.return_blocks([block_id for table in sequence.tables for block_id in table[num_blocks:]])

    def free(self, name: str) -> None:
        """Removes a sequence and frees its blocks, except those that a fork shares."""
        sequence = self.existing(name)
        self.table = {other: kept for other, kept in self.table.items() if other != name}
        self._scheduler.return_blocks(sequence.block_ids)

    def settle(self) -> None:
        """After an exception: the sequences own exactly the blocks that the table lists.

        Anything written in the meantime is after the tokens of every sequence that has the block, or in a block that no
        sequence has.
        """
        self._scheduler.settle_blocks([block for sequence in self.table.values() for block in sequence.block_ids])

    def forget_blocks(self) -> None:
        """Leaves the sequences without blocks, after the memory was lost or the scheduler started over."""
        self.table = {name: ManualSequence(sequence.token_ids) for name, sequence in self.table.items()}

    @property
    def _block_size(self) -> int:
        return self._scheduler.limits.block_size

    @property
    def _num_groups(self) -> int:
        return self._scheduler.limits.groups.num_groups

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _must_copy(self, sequence: ManualSequence) -> bool:
        """Whether the next token would be written into a block that other sequences read too."""
        is_partial = len(sequence.token_ids) % self._block_size > 0
        return is_partial and bool(sequence.tables) and self._scheduler.num_owners(sequence.tables[0][-1]) > 1
