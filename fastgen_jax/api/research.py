"""Logits and hidden states of tokens that the caller chooses: the model of an engine without sampling, for research."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.programs import StepOutput
from fastgen_jax.engine.prompts import TokenIdsInput, checked_token_ids
from fastgen_jax.engine.sampling.tables import SamplingTables
from fastgen_jax.models.states import refuse_states
from fastgen_jax.scheduling import Sequence as HostSequence
from fastgen_jax.scheduling.manual import ManualRow


class SequenceInfo(NamedTuple):
    """How long a sequence is and how long it could become."""

    num_tokens: int
    max_new_tokens: int
    """Tokens that `put` would accept for it now: bounded by the context limit and by free KV blocks."""
    num_blocks: int
    """KV blocks that it holds, including those that it shares with forks."""


class Research:
    """`put`, `query`, `can_schedule` and `flush` as in DeepSpeed's inference engine v2, and more, on an engine.

        research = Research(engine)
        logits = research.put(["mine"], [[1, 2, 3]])
        research.flush("mine")

    The caller controls its sequences: nothing is sampled, none ends on its own, and `flush` frees KV blocks, which come
    from the same pool as those of requests. The engine stores the sequences: another `Research(engine)` has the same
    ones. A call that raises, for example because of an interrupt, leaves all of them as they were.
    """

    def __init__(self, engine: Engine) -> None:
        refuse_states(engine.model, "Research")
        self._engine = engine
        self._sequences = engine.manual_sequences
        self._packer = Packer(engine.config, SamplingTables(engine.config.max_num_seqs, engine.model.vocab_size))

    def __repr__(self) -> str:
        return f"Research({self._engine.describe()}; {len(self._sequences)} sequences)"

    def put(self, uids: Sequence[str | int], tokens: Sequence[TokenIdsInput]) -> np.ndarray:
        """Appends tokens to sequences, new or existing, and returns the logits f32[len(uids), V] after the last of each.

        `tokens` contains a list or an integer array of token ids for each sequence. Long inputs are split over several
        steps. Raises ValueError, before anything changes, if an input is empty or not token ids, if a sequence would
        outgrow the context limit, or if there are too few free KV blocks.
        """
        names, vocab_size = _names(uids), self._engine.model.vocab_size
        if isinstance(tokens, str | bytes | Mapping) or len(names) != len(tokens):
            raise ValueError(f"{len(names)} sequence ids but {len(tokens)} token lists; pass one list per id")
        new = {
            name: checked_token_ids(ids, f"tokens[{i}]", vocab_size=vocab_size)
            for i, (name, ids) in enumerate(zip(names, tokens, strict=True))
        }
        place = {name: i for i, name in enumerate(names)}
        logits = np.zeros((len(names), vocab_size), np.float32)

        def extend() -> None:
            self._sequences.check_room({name: len(ids) for name, ids in new.items()})
            copy_block = self._engine.runner.copy_block
            sequences = [self._sequences.begin(name, ids, copy_block=copy_block) for name, ids in new.items()]
            for output, rows in self._run(sequences, last=1):
                if rows:
                    values = np.asarray(output.logits)
                    for row, sequence, _ in rows:
                        logits[place[sequence.request_id]] = values[row]
            self._sequences.keep(sequences)

        self._engine.exclusive(extend)
        return logits

    def hidden_states(self, tokens: TokenIdsInput, *, last: int | None = None) -> np.ndarray:
        """The input of the head, f32[n, E], at the last `last` positions of `tokens` (None: at all of them), in order.

        That is the residual stream after the last layer and the final norm. The prompt is computed from its first
        token, in steps of at most `max_num_seqs` of these positions, and nothing of it is kept. Raises ValueError as `put`
        does.
        """
        ids = checked_token_ids(tokens, "tokens", vocab_size=self._engine.model.vocab_size)
        if last is not None and not (_is_count(last) and 1 <= last <= len(ids)):
            raise ValueError(f"last is {last!r}, but must be an integer in 1..{len(ids)} (the number of tokens), or None")
        hidden: list[np.ndarray] = []

        def compute() -> None:
            self._sequences.check_room({"tokens": len(ids)}, temporary=True)
            copy_block = self._engine.runner.copy_block
            sequence = self._sequences.begin("tokens", ids, copy_block=copy_block, temporary=True)
            for output, rows in self._run([sequence], last=last or len(ids)):
                if rows:
                    hidden.append(np.asarray(output.hidden)[: len(rows)].astype(np.float32))
            self._sequences.release(sequence)

        self._engine.exclusive(compute)
        return np.concatenate(hidden)

    def fork(self, uid: str | int, new_uid: str | int) -> None:
        """Starts a new sequence with the tokens of another, at no cost: the two share their KV blocks.

        The first `put` to either copies the last block on the device if it is not full, which requires a free block then;
        full blocks stay shared. Raises ValueError if there is no sequence `uid`, or already one of `new_uid`.
        """
        (name,) = _names([new_uid])
        self._engine.exclusive(lambda: self._sequences.fork(str(uid), name))

    def rollback(self, uid: str | int, num_tokens: int) -> None:
        """Removes the last `num_tokens` tokens of a sequence and frees the blocks that held only these; computes nothing.

        Raises ValueError if there is no sequence `uid`, or if no token would be left.
        """

        def truncate() -> None:
            length = len(self._sequences.existing(str(uid)).token_ids)
            if not (_is_count(num_tokens) and 0 <= num_tokens < length):
                raise ValueError(
                    f"num_tokens is {num_tokens!r}, but 0..{length - 1} tokens of sequence {uid!r} can be removed; "
                    "flush it to remove it completely"
                )
            self._sequences.truncate(str(uid), length - int(num_tokens))

        self._engine.exclusive(truncate)

    def query(self, uid: str | int) -> SequenceInfo:
        """The length of a sequence and how many tokens `put` would accept; zeros and the maximum for an unknown one."""

        def info() -> SequenceInfo:
            sequence = self._sequences.get(str(uid))
            return SequenceInfo(len(sequence.token_ids), self._sequences.room(str(uid)), len(sequence.block_ids))

        return self._engine.exclusive(info)

    def can_schedule(self, uids: Sequence[str | int], lengths: Sequence[int]) -> bool:
        """Whether `put` would now accept these numbers of tokens for these sequences."""
        if len(uids) != len(lengths) or any(length < 1 for length in lengths):
            return False

        def fits() -> bool:
            try:
                self._sequences.check_room(dict(zip(_names(uids), lengths, strict=True)))
            except ValueError:
                return False
            return True

        return self._engine.exclusive(fits)

    def flush(self, uid: str | int) -> None:
        """Removes a sequence and frees its blocks, except those that a fork shares; ValueError if there is none."""
        self._engine.exclusive(lambda: self._sequences.free(str(uid)))

    def _run(self, sequences: list[HostSequence], *, last: int) -> Iterator[tuple[StepOutput, list[ManualRow]]]:
        runner = self._engine.runner
        for step, rows in self._sequences.steps(sequences, last=last):
            bucket = runner.bucket(step.num_tokens)
            yield runner.run(self._packer.pack(step, bucket), bucket), rows


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _names(uids: Sequence[str | int]) -> list[str]:
    """Sequence ids as strings; ValueError unless they are a list of different strings and integers."""
    if isinstance(uids, str | bytes | Mapping):
        raise ValueError(f"uids is {uids!r}; pass a list of sequence ids")
    for uid in uids:
        if isinstance(uid, bool) or not isinstance(uid, str | int | np.integer) or uid == "":
            raise ValueError(f"uids contains {uid!r}; a sequence id is a string or an integer")
    names = [str(uid) for uid in uids]
    if len(set(names)) != len(names):
        raise ValueError(f"sequence ids {names} repeat; pass each sequence once, with all its new tokens")
    return names
