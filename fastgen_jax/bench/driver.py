"""Runs requests on an engine in this process, and records what each step contained and how long it took."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastgen_jax import Engine, RequestOutput, SamplingParams
from fastgen_jax.bench.loads import Load, LoadRequest
from fastgen_jax.bench.metrics import RequestTimes
from fastgen_jax.scheduling import Chunk, Step


def exactly(num_tokens: int) -> SamplingParams:
    """Greedy sampling of exactly `num_tokens` tokens: end-of-text tokens are ignored."""
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)


def outputs_of(
    engine: Engine, requests: Iterable[tuple[str, Sequence[int], int]]
) -> Iterator[tuple[float, Sequence[RequestOutput]]]:
    """Adds all requests and runs the engine until they end; yields the outputs of each step and its time.

    A request is (id, prompt token ids, number of tokens to generate). Times are those of `time.perf_counter`.
    """
    for request_id, prompt, num_tokens in requests:
        engine.add(prompt, exactly(num_tokens), request_id=request_id)
    while engine.has_work:
        outputs = engine.step()
        yield time.perf_counter(), outputs


class StepTime(NamedTuple):
    """One step: its contents, and when it was dispatched and read, in seconds on one clock."""

    dispatched: float
    read: float
    start: float
    """When the device could begin it: once it was dispatched and the previous step was read."""
    num_tokens: int
    num_sample_rows: int
    chunks: tuple[tuple[str, int, int], ...]
    """(request id, start, length)."""

    @property
    def seconds(self) -> float:
        """Duration of the step."""
        return self.read - self.start


class StepLog:
    """Records the steps of an engine while its `with` block runs; afterwards the engine is unchanged."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[StepTime] = []
        self._scheduler = engine.scheduler
        self._pending: deque[tuple[float, Step]] = deque()
        self._last_read = 0.0

    def __enter__(self) -> StepLog:
        scheduler = self._scheduler
        schedule, commit = scheduler.schedule, scheduler.commit

        def logged_schedule() -> Step | None:
            step = schedule()
            if step is not None:
                self._pending.append((time.perf_counter(), step))
            return step

        def logged_commit(step: Step, token_ids: Sequence[int]):
            now = time.perf_counter()
            dispatched, _ = self._pending.popleft()
            chunks = tuple(_chunk(chunk) for chunk in step.chunks)
            start = max(dispatched, self._last_read)
            self.steps.append(StepTime(dispatched, now, start, step.num_tokens, step.num_sample_rows, chunks))
            self._last_read = now
            return commit(step, token_ids)

        # Set on this one object: the class and other engines are not affected.
        vars(scheduler).update(schedule=logged_schedule, commit=logged_commit)
        return self

    def __exit__(self, *exc: object) -> None:
        del vars(self._scheduler)["schedule"], vars(self._scheduler)["commit"]


def _chunk(chunk: Chunk) -> tuple[str, int, int]:
    return chunk.sequence.request_id, chunk.start, chunk.length


def run_load(engine: Engine, load: Load) -> tuple[list[RequestTimes], list[str], float]:
    """Runs `load` to its end: the times of each finished request, the ids of those refused, and the start time.

    This uses the engine's own loop and adds due requests between two steps. Times are those of `time.perf_counter`.
    """
    return _Clients(engine, load).run()


class _Clients:
    def __init__(self, engine: Engine, load: Load) -> None:
        self.engine = engine
        self.load = load
        self.due: list[tuple[float, int, LoadRequest]] = []  # a heap
        self.queue = deque(load.requests)
        self.warming = {request.request_id for request in load.warmup}
        self.started: dict[str, tuple[LoadRequest, float]] = {}
        self.times: dict[str, list[float]] = {}
        self.finished: list[RequestTimes] = []
        self.refused: list[str] = []

    def run(self) -> tuple[list[RequestTimes], list[str], float]:
        load, engine = self.load, self.engine
        prompts = {
            request.request_id: load.prompt_ids(request, vocab_size=engine.model.vocab_size)
            for request in (*load.requests, *load.warmup)
        }
        begin = time.perf_counter()
        if load.num_clients is None:
            self.due = [(begin + request.arrival, i, request) for i, request in enumerate(load.requests)]
        elif load.warmup:
            self.due = [(begin, i, request) for i, request in enumerate(load.warmup)]
        else:
            self._start_clients(begin)
        while self.due or engine.has_work:
            now = time.perf_counter()
            while self.due and self.due[0][0] <= now:
                at, _, request = heapq.heappop(self.due)
                engine.add(prompts[request.request_id], exactly(request.max_new_tokens), request_id=request.request_id)
                # In an open loop a request's time runs from when it was due, even if the engine was busy then.
                self.started[request.request_id] = (request, at if load.num_clients is None else now)
                self.times[request.request_id] = []
            if not engine.has_work:
                time.sleep(max(0.0, self.due[0][0] - time.perf_counter()))
                continue
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                self.times[output.request_id] += [now] * len(output.new_token_ids)
                if output.finished:
                    self._ended(output.request_id, now, refused=output.finish_reason == "refused")
        return self.finished, self.refused, begin

    def _ended(self, request_id: str, now: float, *, refused: bool) -> None:
        request, start = self.started.pop(request_id)
        times = self.times.pop(request_id)
        if request_id in self.warming:
            self.warming.remove(request_id)
            if not self.warming:
                self._start_clients(now)
            return
        if refused:
            self.refused.append(request_id)
        else:
            self.finished.append(
                RequestTimes(
                    request_id=request_id, num_prompt_tokens=request.num_prompt_tokens, start=start, token_times=tuple(times)
                )
            )
        if self.load.num_clients is not None:
            self._next_of_client(now)

    def _start_clients(self, now: float) -> None:
        for wait in self.load.stagger:
            self._next_of_client(now + wait)

    def _next_of_client(self, at: float) -> None:
        if self.queue:
            heapq.heappush(self.due, (at, len(self.queue), self.queue.popleft()))
