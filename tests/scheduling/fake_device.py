"""A fake device that checks every step, and a loop that drives a scheduler with it.

Its KV memory stores, for each position and cache group, the position, the group and a hash of all tokens up to it, since
real KV depends on all of them. Every chunk writes its positions and then reads what its queries see back through the block
tables, so a block that was freed or reused too early, shared wrongly or never computed is detected immediately.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgen_jax.scheduling import NEED_PROMISE, Chunk, Promise, Request, SamplingParams, Scheduler, Sequence, Step

VOCAB = 5
EOS = 4


def with_promise(policy: str) -> dict[str, Any]:
    """Scheduler arguments for a policy, with a promise that any device can keep if the policy needs one."""
    if policy not in NEED_PROMISE:
        return {"policy": policy}
    return {"policy": policy, "promise": Promise(prompt_rate=1e-9, generation_rate=1e-9), "clock": lambda: 0.0}


def extend_hash(parent: int, token_id: int) -> int:
    """A hash of a token and all tokens before it."""
    return (parent * 1_000_003 + token_id + 1) % (2**61 - 1)


def sample(seed: int, context_hash: int) -> int:
    """The token that follows a context: an arbitrary function of the request's seed and all tokens."""
    return (context_hash * 7919 + seed * 104_729) % 1_299_709 % VOCAB


def naive_tokens(request: Request, max_context_len: int) -> list[int]:
    """What a request generates when it runs alone, computed without a scheduler."""
    params = request.params
    context_hash = 0
    for token_id in request.prompt_token_ids:
        context_hash = extend_hash(context_hash, token_id)
    room = max_context_len - len(request.prompt_token_ids)
    limit = room if params.max_new_tokens is None else min(room, params.max_new_tokens)
    tokens: list[int] = []
    while len(tokens) < limit:
        token_id = sample(request.seed, context_hash)
        context_hash = extend_hash(context_hash, token_id)
        tokens.append(token_id)
        is_eos = token_id in request.eos_token_ids and not params.ignore_eos
        if (is_eos or token_id in params.stop_token_ids) and len(tokens) > params.min_new_tokens:
            break
    return tokens


def make_request(request_id: object, prompt: Iterable[int], max_new_tokens: int | None = 4, **kwargs) -> Request:
    """A request with defaults for everything that is irrelevant to a test."""
    fields = {name: kwargs.pop(name) for name in ("priority", "arrival_time", "eos_token_ids") if name in kwargs}
    seed = kwargs.pop("seed_number", 0)
    params = SamplingParams(max_new_tokens=max_new_tokens, **kwargs)
    return Request(request_id=str(request_id), prompt_token_ids=tuple(prompt), params=params, seed=seed, **fields)


class FakeDevice:
    """Runs steps immediately and in order; the host may read the sampled tokens later."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, windows: tuple[int | None, ...] = (None,)
    ) -> None:
        self.block_size, self.max_num_seqs, self.windows = block_size, max_num_seqs, windows
        self.memory: list[tuple[int, int, int] | None] = [None] * (num_blocks * block_size)
        self.tables: list[list[int | None]] = [[] for _ in range(max_num_seqs * len(windows))]
        self.hashes: dict[Sequence, int] = {}
        self.last_tokens: list[int | None] = [None] * max_num_seqs
        self.next_position: dict[Sequence, int] = {}
        self.prompt_rows: Counter[tuple[Sequence, int]] = Counter()

    def run(self, step: Step) -> list[int]:
        """Computes the step and returns the token sampled for each of `step.sampled`."""
        admitted = {sequence.slot for sequence in step.admitted}
        for row, first, block_ids in step.block_updates:
            assert block_ids, "an update without blocks"
            if row % self.max_num_seqs in admitted:
                self.tables[row] = [None] * first
            assert first == len(self.tables[row]), "a table is extended at its end"
            self.tables[row] += block_ids
        for sequence in step.preempted:
            del self.next_position[sequence]
        for sequence in step.admitted:
            start = next(chunk.start for chunk in step.chunks if chunk.sequence is sequence)
            assert start % self.block_size == 0, "a sequence starts after whole cached blocks"
            self.next_position[sequence] = start
            self.hashes[sequence] = 0
            for token_id in sequence.token_ids(0, start):
                self.hashes[sequence] = extend_hash(self.hashes[sequence], token_id)
        inputs = [self._inputs(chunk) for chunk in step.chunks]
        for chunk, tokens in zip(step.chunks, inputs, strict=True):
            self._write(chunk, tokens)
        tokens = [self._read(chunk) for chunk in step.chunks]
        sampled = [token for chunk, token in zip(step.chunks, tokens, strict=True) if chunk.samples]
        assert [chunk.sequence for chunk in step.chunks if chunk.samples] == step.sampled
        for sequence, token in zip(step.sampled, sampled, strict=True):
            assert sequence.slot is not None
            self.last_tokens[sequence.slot] = token
        return sampled

    def _inputs(self, chunk: Chunk) -> list[int]:
        """The chunk's tokens: from the host if known, otherwise those that the previous step left on the device."""
        sequence, start, length, num_rows, _ = chunk
        assert sequence.slot is not None
        assert length > 0
        assert start == self.next_position[sequence], "positions are computed in order, each once"
        self.next_position[sequence] = start + length
        for position in range(start + length - num_rows, start + length):
            if position < sequence.num_prompt_tokens:
                self.prompt_rows[sequence, position] += 1
        tokens = sequence.token_ids(start, start + length)
        if len(tokens) < length:
            last = self.last_tokens[sequence.slot]
            assert len(tokens) == length - 1, "only the very last token may be in flight"
            assert last is not None
            tokens.append(last)
        return tokens

    def _slot_of(self, sequence: Sequence, position: int, group: int) -> int:
        assert sequence.slot is not None
        table = self.tables[sequence.slot + group * self.max_num_seqs]
        block, offset = divmod(position, self.block_size)
        assert table[block:] == sequence.tables[group][block:], "the device's block table equals the scheduler's"
        block_id = table[block]
        assert block_id is not None, f"{sequence} has no block for position {position} of group {group}"
        return block_id * self.block_size + offset

    def _write(self, chunk: Chunk, tokens: list[int]) -> None:
        sequence = chunk.sequence
        for position, token_id in enumerate(tokens, chunk.start):
            self.hashes[sequence] = extend_hash(self.hashes[sequence], token_id)
            for group in range(len(self.windows)):
                self.memory[self._slot_of(sequence, position, group)] = (position, self.hashes[sequence], group)

    def _read(self, chunk: Chunk) -> int:
        sequence, stop = chunk.sequence, chunk.start + chunk.length
        hashes = list(itertools.accumulate(sequence.token_ids(0, stop), extend_hash, initial=0))[1:]
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, chunk.start - window + 1)
            for position in range(first, stop):
                entry = self.memory[self._slot_of(sequence, position, group)]
                assert entry is not None, f"{sequence} reads position {position}, which was never written"
                known = hashes[position] if position < len(hashes) else entry[1]
                assert entry == (position, known, group), f"{sequence} reads KV of other tokens at position {position}"
        return sample(sequence.request.seed, self.hashes[sequence])


@dataclass
class Run:
    """The sequences, steps and bypasses of a run."""

    sequences: dict[str, Sequence] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    bypasses: Counter[Sequence] = field(default_factory=Counter)


def device_for(scheduler: Scheduler) -> FakeDevice:
    """A device with the memory that the scheduler assumes."""
    limits = scheduler.limits
    return FakeDevice(
        num_blocks=scheduler._pool.num_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        windows=limits.groups.windows,
    )


def drive(
    scheduler: Scheduler,
    arrivals: Mapping[int, list[Request]],
    *,
    depth: int = 0,
    aborts: Mapping[int, list[str]] | None = None,
    max_steps: int = 20_000,
    device: FakeDevice | None = None,
) -> Run:
    """Serves `arrivals` (requests by step number) to the end with `depth` steps in flight, and checks every step.

    `aborts` lists requests to abort, by step number. `device` is that of an earlier call with the same scheduler.
    """
    aborts, run = aborts or {}, Run()
    device = device or device_for(scheduler)
    in_flight: deque[tuple[Step, list[int]]] = deque()
    last_event = max([*arrivals, *aborts, 0])
    for time in range(max_steps):
        for request in arrivals.get(time, ()):
            run.sequences[request.request_id] = scheduler.add(request)
        for request_id in aborts.get(time, ()):
            scheduler.abort(request_id)
        step = scheduler.schedule()
        if step is not None:
            check_step(scheduler, step, run)
            in_flight.append((step, device.run(step)))
        elif not in_flight and not scheduler.has_work and time > last_event:
            break
        while len(in_flight) > (depth if step else 0):
            done, tokens = in_flight.popleft()
            before = {sequence: len(sequence.output_token_ids) for sequence in done.sampled}
            dropped = {sequence for sequence in done.sampled if sequence.is_finished}
            advanced = scheduler.commit(done, tokens)
            assert advanced == [sequence for sequence in done.sampled if sequence not in dropped]
            assert all(len(sequence.output_token_ids) == before[sequence] + 1 for sequence in advanced)
        scheduler.check_integrity()
    else:
        raise AssertionError(f"not finished after {max_steps} steps")
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.num_free_blocks == scheduler._pool.num_blocks, "blocks leaked"
    for sequence in run.sequences.values():
        if sequence.request.params.prompt_logprobs is not None and sequence.finish_reason not in ("abort", "refused"):
            rows = [device.prompt_rows[sequence, p] for p in range(sequence.num_prompt_tokens)]
            assert rows == [1] * sequence.num_prompt_tokens, "the logits of each prompt position are computed once"
    return run


def check_step(scheduler: Scheduler, step: Step, run: Run) -> None:
    """Checks a step against the limits, and counts how often each sequence was overtaken."""
    limits = scheduler.limits
    assert 0 < step.num_tokens == sum(chunk.length for chunk in step.chunks) <= limits.token_budget
    assert step.num_sample_rows == sum(chunk.num_sample_rows for chunk in step.chunks) <= limits.max_sample_rows
    assert step.num_sequences == len({chunk.sequence for chunk in step.chunks}) <= scheduler.num_running
    assert scheduler.num_running <= limits.max_num_seqs
    for chunk in step.chunks:
        assert chunk.num_sample_rows <= chunk.length
        assert chunk.num_sample_rows >= chunk.samples
        assert not chunk.sequence.is_finished
    for sequence in step.admitted:
        for waiting in scheduler._state.waiting:
            if waiting.order < sequence.order:
                run.bypasses[waiting] += 1
                assert run.bypasses[waiting] <= limits.max_bypasses
    scheduler.check_integrity()
    run.steps.append(step)
