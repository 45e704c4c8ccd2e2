"""Logits for chosen tokens of chosen sequences: the engine without its scheduler, for research."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.sampling_tables import SamplingTables
from fastgen_jax.engine.standing import Standing
from fastgen_jax.scheduling import Chunk, Request, SamplingParams, Step
from fastgen_jax.scheduling import Sequence as HostSequence

if TYPE_CHECKING:
    from fastgen_jax.engine.config import ResolvedConfig
    from fastgen_jax.models.config import ModelConfig


class SequenceInfo(NamedTuple):
    """How far a sequence is and how far it could go."""

    num_tokens: int
    max_new_tokens: int
    """Tokens that `put` would still take for it: bounded by the context limit and by free KV blocks."""
    num_blocks: int


class ResearchInterface(Standing):
    """`put`, `query`, `can_schedule` and `flush`, after DeepSpeed's inference engine v2; part of `Engine`.

    Sequences of `put` share the KV blocks with requests but are the caller's own: nothing is sampled, nothing ends
    by itself, and `flush` gives the blocks back.
    """

    config: ResolvedConfig
    model: ModelConfig

    def _init_research(self) -> None:
        config = self.config
        self._put_sequences: dict[str, HostSequence] = {}
        self._put_tokens: dict[str, list[int]] = {}
        self._put_before: dict[str, int] = {}  # lengths of the sequences that a put has begun to extend
        self._free_put_slots = list(range(config.max_num_seqs))
        self._put_packer = Packer(
            max_num_seqs=config.max_num_seqs, max_blocks=self._runner.max_blocks, num_blocks=config.num_blocks,
            block_size=config.block_size, tables=SamplingTables(config.max_num_seqs, self.model.vocab_size),
        )

    def put(self, uids: Sequence[str | int], tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Appends tokens to sequences, new or known, and returns the logits f32[len(uids), V] after each one's last.

        Long inputs are split over several steps. Raises ValueError, before anything runs, if an input is empty, a
        sequence would outgrow the context limit, or the free KV blocks do not suffice. A
        KeyboardInterrupt leaves them as they were before or as they are after; `query` tells which.
        """
        uids = [str(uid) for uid in uids]
        with self._turn, self._lock:
            self._begin()
            try:
                self._check_put(uids, tokens)
            except ValueError:
                self._open = False  # nothing has changed
                raise
            self._put_before = {uid: len(self._put_tokens.get(uid, ())) for uid in uids}
            logits = self._put(uids, tokens)
            self._put_before = {}
            self._open = False
        return logits

    def _put(self, uids: Sequence[str], tokens: Sequence[Sequence[int]]) -> np.ndarray:
        for uid, new in zip(uids, tokens, strict=True):
            self._extend(uid, [int(token) for token in new])
        logits = np.zeros((len(uids), self.model.vocab_size), np.float32)
        place = {uid: i for i, uid in enumerate(uids)}
        pending = list(uids)
        while pending:
            step, pending, finished = self._next_put_step(pending)
            bucket = self._runner.bucket(step.num_tokens)
            output = self._runner.run(self._put_packer.pack(step, bucket), bucket)
            if finished:
                rows = np.asarray(output.logits)
                for row, uid in enumerate(finished):
                    logits[place[uid]] = rows[row]
        return logits

    def query(self, uid: str | int) -> SequenceInfo:
        """How long a sequence is and how many tokens `put` would still take; zeros and the maximum for an unknown one."""
        with self._turn, self._lock:
            self._begin()  # what an interrupted put has left behind does not count
            self._open = False
            limit = self.config.max_context_len
            sequence = self._put_sequences.get(str(uid))
            block_size = self.config.block_size
            blocks = len(sequence.block_ids) if sequence else 0
            num_tokens = len(self._put_tokens.get(str(uid), ()))
            room = (blocks + self._scheduler.num_free_blocks) * block_size
            return SequenceInfo(num_tokens, max(min(limit, room) - num_tokens, 0), blocks)

    def can_schedule(self, uids: Sequence[str | int], lengths: Sequence[int]) -> bool:
        """Whether `put` of so many tokens for each of these sequences would be accepted now."""
        with self._turn, self._lock:
            self._begin()
            self._open = False
            try:
                self._check_put([str(uid) for uid in uids], [range(length) for length in lengths])
            except ValueError:
                return False
            return True

    def flush(self, uid: str | int) -> None:
        """Forgets a sequence of `put` and frees its blocks; ValueError if there is none."""
        with self._turn, self._lock:
            self._begin()
            sequence = self._put_sequences.pop(str(uid), None)
            if sequence is not None:
                del self._put_tokens[str(uid)]
                self._scheduler.return_blocks(sequence.block_ids)
                assert sequence.slot is not None  # from its first put to its flush
                self._free_put_slots.append(sequence.slot)
            self._open = False
        if sequence is None:
            raise ValueError(f"no sequence {uid!r}; known: {', '.join(map(repr, self._put_sequences)) or 'none'}")

    def _restart_research(self, *, keep: bool) -> None:
        """Makes the books anew when all blocks are blank: kept sequences are computed again by their next `put`."""
        if not keep:
            self._init_research()
            return
        lengths = {uid: len(tokens) for uid, tokens in self._put_tokens.items()} | self._put_before
        tokens = {uid: tokens[: lengths[uid]] for uid, tokens in self._put_tokens.items()
                  if lengths[uid] and uid in self._put_sequences}
        sequences = {uid: sequence for uid, sequence in self._put_sequences.items() if uid in tokens}
        for sequence in sequences.values():
            sequence.num_computed, sequence.block_ids = 0, []
        used = {sequence.slot for sequence in sequences.values()}
        free = [slot for slot in range(self.config.max_num_seqs) if slot not in used]
        # In one: this may be interrupted too.
        self._put_sequences, self._put_tokens, self._free_put_slots, self._put_before = sequences, tokens, free, {}

    def _check_put(self, uids: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        if len(uids) != len(tokens):
            raise ValueError(f"{len(uids)} sequence ids but {len(tokens)} token lists; give one list for each id")
        if len(set(uids)) != len(uids):
            raise ValueError(f"sequence ids {list(uids)} repeat; give each sequence once, with all its new tokens")
        limit = self.config.max_context_len
        blocks = 0
        for uid, new in zip(uids, tokens, strict=True):
            if not len(new):
                raise ValueError(f"no tokens for sequence {uid!r}; give at least one")
            bad = next((t for t in new if not 0 <= t < self.model.vocab_size), None)
            if bad is not None and not isinstance(new, range):
                raise ValueError(f"token id {bad} is outside the vocabulary, 0..{self.model.vocab_size - 1}")
            total = len(self._put_tokens.get(uid, ())) + len(new)
            if total > limit:
                raise ValueError(f"sequence {uid!r} would have {total} tokens but max_context_len is {limit}; flush it")
            held = self._put_sequences.get(uid)
            blocks += -(-total // self.config.block_size) - (len(held.block_ids) if held else 0)
        free = self._scheduler.num_free_blocks
        if blocks > free:
            raise ValueError(f"put needs {blocks} KV blocks and {free} are free; flush sequences or wait for requests")
        new_sequences = sum(uid not in self._put_sequences for uid in uids)
        if new_sequences > len(self._free_put_slots):
            raise ValueError(
                f"{new_sequences} new sequences but only {len(self._free_put_slots)} of max_num_seqs="
                f"{self.config.max_num_seqs} are free; flush some"
            )

    def _extend(self, uid: str, new: list[int]) -> None:
        tokens = self._put_tokens.setdefault(uid, [])
        tokens += new
        old = self._put_sequences.get(uid)
        request = Request(request_id=uid, prompt_token_ids=tuple(tokens), params=SamplingParams(), seed=0)
        sequence = HostSequence(request, max_total_tokens=len(tokens), order=(0, 0.0, 0))
        if old is not None:
            sequence.num_computed, sequence.block_ids, sequence.slot = old.num_computed, old.block_ids, old.slot
        else:
            sequence.slot = self._free_put_slots.pop()
        missing = -(-len(tokens) // self.config.block_size) - len(sequence.block_ids)
        sequence.block_ids += self._scheduler.borrow_blocks(missing)
        self._put_sequences[uid] = sequence

    def _next_put_step(self, pending: list[str]) -> tuple[Step, list[str], list[str]]:
        """A step over the pending sequences, those that remain after it, and those whose last token it computes."""
        budget, max_rows = self.config.full_step, self.config.max_sample_rows
        chunks, updates, finished, remaining = [], [], [], []
        for uid in pending:
            sequence = self._put_sequences[uid]
            missing = len(self._put_tokens[uid]) - sequence.num_computed
            length = min(missing, budget) if len(chunks) < max_rows else 0
            if length < missing:
                remaining.append(uid)
            if not length:
                continue
            done = length == missing
            chunks.append(Chunk(sequence, sequence.num_computed, length, int(done), False))
            updates.append((sequence.slot, 0, sequence.block_ids))
            sequence.num_computed += length
            budget -= length
            if done:
                finished.append(uid)
        step = Step(
            chunks=chunks, sampled=[], block_updates=updates, admitted=[], preempted=[],
            num_tokens=sum(chunk.length for chunk in chunks), num_sample_rows=len(finished),
        )
        return step, remaining, finished


