"""Texts as vectors: the final hidden states of an engine's model, of the last token or averaged over all tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.sampling.tables import SamplingTables
from fastgen_jax.models.states import refuse_states

Pooling = Literal["last", "mean"]
ROOM_SECONDS = 60.0  # to wait for KV blocks that running requests hold
POLL_SECONDS = 0.01
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The results for one text."""

    hidden: np.ndarray
    """f32[E]: the input of the head, of the last token or averaged over all tokens."""
    logits: np.ndarray
    """f32[n]: the logits, after the last token, of the n tokens that were asked for."""


@dataclass
class _Text:
    """A text of which the first `done` tokens are computed."""

    index: int
    token_ids: tuple[int, ...]
    name: str = field(default_factory=lambda: f"pooled-{next(_numbers)}")
    done: int = 0
    total: np.ndarray | float = 0.0


def pool(
    engine: Engine, texts: Sequence[tuple[int, ...]], pooling: Pooling, *, token_ids: tuple[int, ...] = ()
) -> list[Pooled]:
    """The results for texts, in order. Call it in any thread, and not twice at the same time for an engine.

    It runs one step at a time between the steps of requests, with the same programs, which compute the head for
    `max_num_seqs` rows: "mean" takes a step for as many tokens, "last" for as many texts. Raises ValueError if a text is
    longer than the context, or requests do not free enough KV blocks within a minute.
    """
    refuse_states(engine.model, "an embedding")
    limit = engine.config.longest_sequence
    for text in texts:
        if len(text) > limit:
            raise ValueError(f"the input has {len(text)} tokens, but at most {limit} fit into the context; shorten it")
    run = _Run(engine, pooling, token_ids)
    waiting = [_Text(i, ids) for i, ids in enumerate(texts)][::-1]
    active: list[_Text] = []
    results: dict[int, Pooled] = {}
    end = time.monotonic() + ROOM_SECONDS
    try:
        while waiting or active:
            finished = engine.exclusive(lambda: run.step(active, waiting))
            if finished is None:
                if time.monotonic() > end:
                    raise ValueError("requests hold the KV cache, so that the input does not fit; try again later")
                time.sleep(POLL_SECONDS)
                continue
            results.update(finished)
            end = time.monotonic() + ROOM_SECONDS
    finally:
        if active:  # it failed
            engine.exclusive(lambda: run.free(active))
    return [results[i] for i in range(len(texts))]


class _Run:
    """Computes texts with the steps of an engine."""

    def __init__(self, engine: Engine, pooling: Pooling, token_ids: tuple[int, ...]) -> None:
        self._engine = engine
        self._pooling = pooling
        self._token_ids = list(token_ids)
        self._sequences = engine.manual_sequences
        self._packer = Packer(engine.config, SamplingTables(engine.config.max_num_seqs, engine.model.vocab_size))

    def step(self, active: list[_Text], waiting: list[_Text]) -> dict[int, Pooled] | None:
        """Runs one step for the active texts and for waiting ones that fit; returns what is finished.

        Takes texts from the end of `waiting`, and removes finished ones from `active`. None if there is no room.
        """
        limits = self._engine.scheduler.limits
        rows = min(limits.max_sample_rows, limits.max_num_seqs)
        tokens_left = min(limits.token_budget, rows) if self._pooling == "mean" else limits.token_budget
        while waiting and len(active) < rows and self._fits([*active, waiting[-1]]):
            active.append(waiting.pop())
        pieces: list[tuple[_Text, tuple[int, ...]]] = []
        for text in active:
            piece = text.token_ids[text.done : text.done + tokens_left]
            if piece and self._has_room([*pieces, (text, piece)]):
                pieces.append((text, piece))
                tokens_left -= len(piece)
        if not pieces:
            return None
        copy_block, runner = self._engine.runner.copy_block, self._engine.runner
        begun = [self._sequences.begin(text.name, piece, copy_block=copy_block) for text, piece in pieces]
        texts = {text.name: text for text, _ in pieces}
        finished: dict[int, Pooled] = {}
        last = max(len(piece) for _, piece in pieces) if self._pooling == "mean" else 1
        for step, found in self._sequences.steps(begun, last=last):
            bucket = runner.bucket(step.num_tokens)
            output = runner.run(self._packer.pack(step, bucket), bucket)
            hidden = np.asarray(output.hidden).astype(np.float32)
            logits = np.asarray(output.logits) if self._token_ids else None
            for row, sequence, position in found:
                text = texts[sequence.request_id]
                text.total = hidden[row] if self._pooling == "last" else text.total + hidden[row]
                if position == len(text.token_ids) - 1:
                    count = 1 if self._pooling == "last" else len(text.token_ids)
                    chosen = np.zeros(0, np.float32) if logits is None else logits[row][self._token_ids]
                    finished[text.index] = Pooled(hidden=np.asarray(text.total) / np.float32(count), logits=chosen)
        self._sequences.keep(begun)
        for text, piece in pieces:
            text.done += len(piece)
        self.free([text for text, _ in pieces if text.index in finished])
        active[:] = [text for text in active if text.index not in finished]
        return finished

    def free(self, texts: Sequence[_Text]) -> None:
        """Returns the KV blocks of texts."""
        for text in texts:
            if text.name in self._sequences.table:
                self._sequences.free(text.name)

    def _fits(self, texts: Sequence[_Text]) -> bool:
        return self._has_room([(text, text.token_ids[text.done :]) for text in texts])

    def _has_room(self, pieces: Sequence[tuple[_Text, tuple[int, ...]]]) -> bool:
        try:
            self._sequences.check_room({text.name: len(piece) for text, piece in pieces})
        except ValueError:
            return False
        return True
