"""Steps over the sequences of `put`: plans without a policy, because nobody has to wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fastgen_jax.scheduling import Chunk, Request, SamplingParams, Sequence, Step


class PutSequence(NamedTuple):
    """A sequence of `put` between two calls: all of its tokens are computed and lie in its blocks.

    Without blocks none is: the next `put` computes it from the first token.
    """

    token_ids: tuple[int, ...] = ()
    block_ids: tuple[int, ...] = ()


class PutRow(NamedTuple):
    """A row of a step's results, and the token that it belongs to."""

    row: int
    sequence: Sequence
    position: int


def new_draft(name: str, held: PutSequence, token_ids: tuple[int, ...], block_ids: list[int]) -> Sequence:
    """`held` with `token_ids` still to be computed, into `block_ids`."""
    tokens = held.token_ids + token_ids
    request = Request(request_id=name, prompt_token_ids=tokens, params=SamplingParams(), seed=0)
    sequence = Sequence(request, max_total_tokens=len(tokens), order=(0, 0.0, 0))
    sequence.num_computed = len(held.token_ids) if held.block_ids else 0
    sequence.block_ids = block_ids
    return sequence


def put_steps(
    sequences: list[Sequence], *, last: int, token_budget: int, max_rows: int
) -> Iterator[tuple[Step, list[PutRow]]]:
    """The steps that compute what is missing, each with the rows wanted of it: the last `last` positions of a sequence.

    Run each before asking for the next. A step has at most `token_budget` tokens, and `max_rows` rows and sequences.
    """
    pending = sequences
    while pending:
        chunks, updates, rows, remaining = [], [], [], []
        tokens_left = token_budget
        for sequence in pending:
            start, total = sequence.num_computed, sequence.num_prompt_tokens
            first_row = max(start, total - last)
            stop = min(total, start + tokens_left, first_row + max_rows - len(rows))
            if stop <= start or len(chunks) == max_rows:
                remaining.append(sequence)
                continue
            sequence.slot = len(chunks)  # for this step alone
            num_rows = max(0, stop - first_row)
            chunks.append(Chunk(sequence, start, stop - start, num_rows, False))
            updates.append((sequence.slot, 0, sequence.block_ids))
            rows += [PutRow(len(rows) + i, sequence, stop - num_rows + i) for i in range(num_rows)]
            tokens_left -= stop - start
            sequence.num_computed = stop
            if stop < total:
                remaining.append(sequence)
        yield (
            Step(
                chunks=chunks,
                sampled=[],
                block_updates=updates,
                admitted=[],
                preempted=[],
                num_tokens=token_budget - tokens_left,
                num_sample_rows=len(rows),
            ),
            rows,
        )
        pending = remaining
