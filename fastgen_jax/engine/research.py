"""Logits, hidden states and weights for chosen tokens: the engine without its scheduler, for research."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.put_steps import PutRow, PutSequence, new_draft, put_steps
from fastgen_jax.engine.replacement import replacement_params
from fastgen_jax.engine.sampling_tables import SamplingTables
from fastgen_jax.engine.standing import Standing
from fastgen_jax.engine.token_ids import checked_token_ids
from fastgen_jax.scheduling import Sequence as HostSequence

if TYPE_CHECKING:
    from fastgen_jax.engine.config import ResolvedConfig
    from fastgen_jax.engine.runner import StepOutput
    from fastgen_jax.models.config import ModelConfig
    from fastgen_jax.models.weight_spec import Params


class SequenceInfo(NamedTuple):
    """How far a sequence is and how far it could go."""

    num_tokens: int
    max_new_tokens: int
    """Tokens that `put` would still take for it: bounded by the context limit and by free KV blocks."""
    num_blocks: int
    """KV blocks that it holds, those that it shares with forks included."""


class ResearchInterface(Standing):
    """`put`, `query`, `can_schedule` and `flush`, after DeepSpeed's inference engine v2, and more; part of `Engine`.

    Sequences of `put` share the KV blocks with requests but are the caller's own: nothing is sampled, nothing ends
    by itself, and `flush` gives the blocks back. A call that raises, be it by an interrupt, leaves all of them as they
    were.
    """

    config: ResolvedConfig
    model: ModelConfig

    def _init_research(self) -> None:
        config = self.config
        self._put_sequences: Mapping[str, PutSequence] = {}  # replaced, never changed
        self._put_packer = Packer(
            max_num_seqs=config.max_num_seqs,
            max_blocks=self._runner.max_blocks,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            tables=SamplingTables(config.max_num_seqs, self.model.vocab_size),
        )

    # Weights

    @property
    def params(self) -> Params:
        """The weights as the engine computes with them: in its dtype, packed for a CPU or quantised as configured.

        Assign weights of the same model, plain ones (as `load_params` and `init_params` give them) or prepared ones, to
        compute with them from then on. Plain ones are prepared as at the start; the compiled programs stay; cached
        prefixes are forgotten. For a moment both are in memory. Raises ValueError, and changes nothing, if a weight is
        missing, superfluous or of another shape or kind, and while there are requests or sequences of `put`, whose keys
        and values are those of the old weights.
        """
        return self._runner.params

    @params.setter
    def params(self, params: Params) -> None:
        with self._turn, self._lock, self._all_or_nothing():
            self._refuse_while_busy("weights can be replaced")
            prepared = replacement_params(params, self._runner.params, self.model, self.config)
            self._scheduler.reset_prefix_cache()  # first: an interrupt between the two then costs no more than a prefix
            self._runner.replace_params(prepared)

    def reset_prefix_cache(self) -> None:
        """Forgets every prefix that was computed before this call: no later request finds it. Running ones go on."""
        with self._turn, self._lock, self._all_or_nothing():
            self._scheduler.reset_prefix_cache()

    # Sequences

    def put(self, uids: Sequence[str | int], tokens: Sequence[Any]) -> np.ndarray:
        """Appends tokens to sequences, new or known, and returns the logits f32[len(uids), V] after each one's last.

        `tokens` has a list or an integer array of token ids for each sequence. Long inputs are split over several
        steps. Raises ValueError, before anything changes, if an input is empty or no token ids, a sequence would
        outgrow the context limit, or the free KV blocks do not suffice.
        """
        names = _names(uids)
        if isinstance(tokens, str | bytes | Mapping) or len(names) != len(tokens):
            raise ValueError(f"{len(names)} sequence ids but {len(tokens)} token lists; give one list for each id")
        new = [checked_token_ids(ids, f"tokens[{i}]", vocab_size=self.model.vocab_size) for i, ids in enumerate(tokens)]
        place = {name: i for i, name in enumerate(names)}
        logits = np.zeros((len(names), self.model.vocab_size), np.float32)
        with self._turn, self._lock, self._all_or_nothing():
            before = [self._put_sequences.get(name, PutSequence()) for name in names]
            self._check_room(names, before, [len(ids) for ids in new])
            drafts = [self._draft(*what) for what in zip(names, before, new, strict=True)]
            for output, rows in self._run(drafts, last=1):
                values = np.asarray(output.logits) if rows else None
                for row, sequence, _ in rows:
                    assert values is not None
                    logits[place[sequence.request_id]] = values[row]
            after = [PutSequence(draft.request.prompt_token_ids, tuple(draft.block_ids)) for draft in drafts]
            self._put_sequences = {**self._put_sequences, **dict(zip(names, after, strict=True))}
            for old, now in zip(before, after, strict=True):  # a shared block of which there is a copy now
                self._scheduler.return_blocks([a for a, b in zip(old.block_ids, now.block_ids, strict=False) if a != b])
        return logits

    def hidden_states(self, tokens: Any, *, last: int | None = None) -> np.ndarray:
        """What the head reads, f32[n, E], at the last `last` positions of `tokens` (None: at all of them), in order.

        That is the residual stream behind the last layer and the final norm. The prompt is computed from its first
        token, in steps of at most `max_num_seqs` wanted positions, and leaves nothing behind. Raises ValueError as
        `put` does.
        """
        ids = checked_token_ids(tokens, "tokens", vocab_size=self.model.vocab_size)
        if last is not None and not (_is_count(last) and 1 <= last <= len(ids)):
            raise ValueError(f"last is {last!r}, but must be a whole number in 1..{len(ids)}, the number of tokens, or None")
        hidden: list[np.ndarray] = []
        with self._turn, self._lock, self._all_or_nothing():
            self._check_room(["tokens"], [PutSequence()], [len(ids)])
            draft = self._draft("tokens", PutSequence(), ids)
            for output, rows in self._run([draft], last=last or len(ids)):
                if rows:
                    hidden.append(np.asarray(output.hidden)[: len(rows)].astype(np.float32))
            self._scheduler.return_blocks(draft.block_ids)
        return np.concatenate(hidden)

    def fork(self, uid: str | int, new_uid: str | int) -> None:
        """Begins a new sequence with the tokens of another, at no cost: the two share their KV blocks.

        The first `put` to either copies the last block on the device if it is not full, which takes a free block then;
        full ones stay shared. Raises ValueError if there is no sequence `uid`, or one of `new_uid` already.
        """
        (name,) = _names([new_uid])
        with self._turn, self._lock, self._all_or_nothing():
            held = self._held(uid)
            if name in self._put_sequences:
                raise ValueError(f"there is a sequence {name!r} already; choose another id, or flush it first")
            self._scheduler.share_blocks(held.block_ids)
            self._put_sequences = {**self._put_sequences, name: held}

    def rollback(self, uid: str | int, num_tokens: int) -> None:
        """Takes back the last `num_tokens` tokens of a sequence, and frees the blocks that held nothing else; no work.

        Raises ValueError if there is no sequence `uid`, or not one token would be left.
        """
        with self._turn, self._lock, self._all_or_nothing():
            held = self._held(uid)
            most = len(held.token_ids) - 1
            if not (_is_count(num_tokens) and 0 <= num_tokens <= most):
                raise ValueError(
                    f"num_tokens is {num_tokens!r}, but sequence {uid!r} can give back 0..{most} tokens; "
                    "flush it to forget it altogether"
                )
            left = len(held.token_ids) - num_tokens
            num_blocks = -(-left // self.config.block_size)
            shorter = PutSequence(held.token_ids[:left], held.block_ids[:num_blocks])
            self._put_sequences = {**self._put_sequences, str(uid): shorter}
            self._scheduler.return_blocks(held.block_ids[num_blocks:])

    def query(self, uid: str | int) -> SequenceInfo:
        """How long a sequence is and how many tokens `put` would still take; zeros and the maximum for an unknown one."""
        with self._turn, self._lock:
            self._mend_if_open()
            held = self._put_sequences.get(str(uid), PutSequence())
            blocks = len(held.block_ids) + self._scheduler.num_free_blocks - self._must_copy(held)
            room = min(self.config.max_context_len, blocks * self.config.block_size)
            num_tokens = len(held.token_ids)
            return SequenceInfo(num_tokens, max(room - num_tokens, 0), len(held.block_ids))

    def can_schedule(self, uids: Sequence[str | int], lengths: Sequence[int]) -> bool:
        """Whether `put` of so many tokens for each of these sequences would be accepted now."""
        if len(uids) != len(lengths) or any(length < 1 for length in lengths):
            return False
        with self._turn, self._lock:
            self._mend_if_open()
            try:
                names = _names(uids)
                self._check_room(names, [self._put_sequences.get(name, PutSequence()) for name in names], lengths)
            except ValueError:
                return False
            return True

    def flush(self, uid: str | int) -> None:
        """Forgets a sequence of `put` and frees its blocks, save those that a fork shares; ValueError if there is none."""
        with self._turn, self._lock, self._all_or_nothing():
            held = self._held(uid)
            self._put_sequences = {name: other for name, other in self._put_sequences.items() if name != str(uid)}
            self._scheduler.return_blocks(held.block_ids)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """An operation; the blocks belong to `_put_sequences` and to nobody else after an exception, wherever it came.

        What was written meanwhile lies behind the tokens of every sequence that has the block, or in nobody's block. If the
        device's memory was lost, or this was interrupted too, the next operation begins anew.
        """
        self._begin()
        try:
            yield
        except BaseException:
            if not self._runner.memory_is_lost:
                self._scheduler.settle_blocks([i for held in self._put_sequences.values() for i in held.block_ids])
                self._open = False
            raise
        self._open = False

    def _restart_research(self) -> None:
        """Leaves the sequences without blocks, when all are blank: their next `put` computes them again."""
        self._put_sequences = {name: PutSequence(held.token_ids) for name, held in self._put_sequences.items()}

    def _run(self, drafts: list[HostSequence], *, last: int) -> Iterator[tuple[StepOutput, list[PutRow]]]:
        config = self.config
        for step, rows in put_steps(drafts, last=last, token_budget=config.full_step, max_rows=config.max_sample_rows):
            bucket = self._runner.bucket(step.num_tokens)
            yield self._runner.run(self._put_packer.pack(step, bucket), bucket), rows

    def _draft(self, name: str, held: PutSequence, token_ids: tuple[int, ...]) -> HostSequence:
        blocks = list(held.block_ids)
        if self._must_copy(held):
            (copy,) = self._scheduler.borrow_blocks(1)
            self._runner.copy_block(blocks[-1], copy)
            blocks[-1] = copy
        needed = -(-(len(held.token_ids) + len(token_ids)) // self.config.block_size)
        blocks += self._scheduler.borrow_blocks(needed - len(blocks))
        return new_draft(name, held, token_ids, blocks)

    def _must_copy(self, held: PutSequence) -> bool:
        """Whether the next token would be written into a block that others read too."""
        partial = len(held.token_ids) % self.config.block_size
        return bool(partial and held.block_ids) and self._scheduler.num_owners(held.block_ids[-1]) > 1

    def _held(self, uid: str | int) -> PutSequence:
        held = self._put_sequences.get(str(uid))
        if held is None:
            known = ", ".join(map(repr, self._put_sequences)) or "none"
            raise ValueError(f"no sequence {uid!r}; known: {known}")
        return held

    def _check_room(self, names: Sequence[str], before: Sequence[PutSequence], lengths: Sequence[int]) -> None:
        limit = self.config.max_context_len
        blocks = 0
        for name, held, length in zip(names, before, lengths, strict=True):
            total = len(held.token_ids) + length
            if total > limit:
                raise ValueError(f"sequence {name!r} would have {total} tokens but max_context_len is {limit}; flush it")
            blocks += -(-total // self.config.block_size) - len(held.block_ids) + self._must_copy(held)
        free = self._scheduler.num_free_blocks
        if blocks > free:
            raise ValueError(f"put needs {blocks} KV blocks and {free} are free; flush sequences or wait for requests")

    def _refuse_while_busy(self, what: str) -> None:
        if self.has_work or self._put_sequences:
            raise ValueError(
                f"the engine has {self._scheduler.num_running + self._scheduler.num_waiting} requests and "
                f"{len(self._put_sequences)} sequences of put; {what} while it is idle: finish or abort "
                "the requests, flush the sequences"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _names(uids: Sequence[str | int]) -> list[str]:
    """Sequence ids as strings; ValueError if they are not a list of different strings and integers."""
    if isinstance(uids, str | bytes | Mapping):
        raise ValueError(f"uids is {uids!r}; give the sequence ids in a list")
    for uid in uids:
        if isinstance(uid, bool) or not isinstance(uid, str | int | np.integer) or uid == "":
            raise ValueError(f"uids holds {uid!r}; a sequence id is a string or an integer")
    names = [str(uid) for uid in uids]
    if len(set(names)) != len(names):
        raise ValueError(f"sequence ids {names} repeat; give each sequence once, with all its new tokens")
    return names
