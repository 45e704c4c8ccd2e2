"""The engine for asyncio: output streams, a bounded queue, deadlines."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from fastgen_jax.api.engine_thread import EngineThread, Event, Failure, Load
from fastgen_jax.api.pooling import Pooled, Pooling, pool
from fastgen_jax.api.snapshot import take_snapshot
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.engine.prompts import Prompt, TokenIds, TokenIdsInput
from fastgen_jax.engine.scoring import Scores, scores_of, scoring_requests
from fastgen_jax.engine.sleep import WeightsPlace
from fastgen_jax.engine.updating import PauseMode
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import Request, SamplingParams
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

T = TypeVar("T")
EVENTS_PER_TURN = 32  # a turn of the event loop then takes a few milliseconds
MAX_QUEUE = 1024  # requests; beyond that, clients should retry later


class QueueFullError(Exception):
    """Too many requests are waiting; `retry_after` is the estimated wait in whole seconds, at least 1."""

    def __init__(self, num_waiting: int, limit: int, wait_seconds: float) -> None:
        self.retry_after = max(1, math.ceil(wait_seconds))
        super().__init__(f"{num_waiting} requests are waiting and the limit is {limit}; retry in {self.retry_after} s")


class ClosedError(Exception):
    """The engine accepts no more requests."""


class RequestFailedError(Exception):
    """A request ended without an answer; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


class Stream:
    """The outputs of one request; read them with `async for`.

    The engine does not wait for a slow reader: outputs accumulate. `close` ends the request.
    """

    def __init__(self, request: Request, on_close: Callable[[Stream], object]) -> None:
        self.request = request
        self.outputs = 0
        self.on_put: Callable[[], object] | None = None
        """Called after each event, for readers of many streams."""
        self._pending: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._on_close = on_close
        self._done = False  # whether the last event has arrived

    def put(self, event: Event) -> None:
        """Adds an event; for the creator of the stream."""
        self._pending.append(event)
        self.outputs += 1
        self._done |= isinstance(event, Failure) or event.finished
        self._wake()

    @property
    def is_exhausted(self) -> bool:
        """Whether all events were taken and no more will arrive."""
        return self._done and not self._pending

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if not await self._wait():
            raise StopAsyncIteration
        return _checked(self._pending.popleft())

    async def batches(self) -> AsyncIterator[list[RequestOutput]]:
        """Lists of the available outputs: one output each for a reader that keeps up."""
        while await self._wait():
            yield self.take()

    def take(self) -> list[RequestOutput]:
        """Removes and returns the available outputs; raises RequestFailedError if a failure is the only event left."""
        outputs = []
        while self._pending and not (outputs and isinstance(self._pending[0], Failure)):
            outputs.append(_checked(self._pending.popleft()))
        return outputs

    async def _wait(self) -> bool:
        """Waits for an event; False if no more will arrive."""
        while not self._pending:
            if self._done:
                return False
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True

    def close(self) -> None:
        """Ends the request if it is unfinished; its blocks are freed before the next step."""
        if not self._done:
            self._done = True
            self._pending.clear()  # nothing follows
            self._on_close(self)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.on_put is not None:
            self.on_put()


class AsyncEngine:
    """An engine in its own thread, driven from one event loop.

        async with AsyncEngine(engine) as engine:
            async for output in engine.generate("Once upon a time", SamplingParams(max_new_tokens=16)):
                print(output.text, end="")

    At most `max_queue` requests wait; further ones are refused. After `sleep_idle` seconds without a request the engine
    gives its memory back (`Engine.sleep`), and the next request wakes it.
    """

    def __init__(self, engine: Engine, *, max_queue: int = MAX_QUEUE, sleep_idle: float | None = None) -> None:
        self.intake: Intake = engine.intake
        self.max_queue = max_queue
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Stream] = {}
        self._undelivered: deque[Event] = deque()
        self._closed = False
        self._engine = engine
        self._pooling = asyncio.Lock()
        self._num_pooling = 0
        self._thread = EngineThread(engine, self._hand_over, sleep_idle=sleep_idle)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.num_unfinished} unfinished requests, at most {self.max_queue} waiting"
        return f"AsyncEngine({self.intake.config}; {state})"

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def load(self) -> Load:
        """The current load of the engine."""
        return self._thread.load

    @property
    def num_unfinished(self) -> int:
        """Submitted requests that have not ended."""
        return len(self._streams)

    @property
    def num_failed_steps(self) -> int:
        """Steps that raised an exception."""
        return self._thread.num_failed_steps

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any request again; None if it can."""
        if self._thread.has_ended and not self._closed:
            return "the engine could not recover from an error, which is in its log; restart the server"
        return None

    @property
    def is_ready(self) -> bool:
        """Whether the engine accepts requests."""
        return not self._thread.has_ended and not self._closed

    @property
    def is_asleep(self) -> bool:
        """Whether the engine has given its memory back; the next request wakes it."""
        return self.load.is_asleep

    def submit(
        self,
        request: Request,
        *,
        grammar: Grammar | None = None,
        matcher: GrammarMatcher | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """Queues a checked request (`intake.request`) and returns its stream.

        `matcher` belongs to `grammar` and is created here by default. `deadline` is in seconds of `time.monotonic`.
        Raises QueueFullError, ClosedError, and ValueError for an id in use or an unsupported grammar.
        """
        if not self.is_ready:
            raise ClosedError(self.failure or "this server accepts no more requests: it is shutting down")
        num_waiting = self._thread.num_waiting
        if num_waiting >= self.max_queue:
            raise QueueFullError(num_waiting, self.max_queue, self.load.wait_seconds)
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is already in use; choose another, or omit it")
        if grammar is not None and matcher is None:
            matcher = self.intake.matcher(grammar)
        self._loop = asyncio.get_running_loop()
        stream = self._streams[request.request_id] = Stream(request, self._on_stream_closed)
        try:
            self._thread.submit(request, matcher, deadline=deadline)
        except RuntimeError as error:
            self._streams.pop(request.request_id, None)
            raise ClosedError(f"this server accepts no more requests: {error}") from None
        return stream

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        grammar: Grammar | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The outputs for one prompt as they are generated; leaving the loop early ends the request.

        Raises ValueError for a request that cannot run, QueueFullError and ClosedError as `submit` does, and
        RequestFailedError if the request fails or is not finished after `timeout` seconds.
        """

        def checked() -> tuple[Request, GrammarMatcher | None]:
            matcher = None if grammar is None else self.intake.matcher(grammar)
            token_ids = self.intake.encode(prompt)
            return self.intake.request(token_ids, params, priority=priority, awaits_each_token=matcher is not None), matcher

        request, matcher = await asyncio.to_thread(checked)
        deadline = None if timeout is None else time.monotonic() + timeout
        stream = self.submit(request, matcher=matcher, deadline=deadline)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Returns `function(engine)`, run in the engine's thread between two steps; ClosedError if the thread has ended."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run(engine: Engine) -> None:
            try:
                result = function(engine)
            except Exception as error:
                loop.call_soon_threadsafe(_fail, future, error)
            else:
                loop.call_soon_threadsafe(_succeed, future, result)

        try:
            self._thread.call(run)
        except RuntimeError as error:
            raise ClosedError(str(error)) from None
        return await future

    async def update_params(
        self, params: Params | str | os.PathLike[str], *, version: int | None = None, recompute: bool = False
    ) -> int:
        """See `Engine.update_params`; steps go on while the weights are read and prepared."""
        return await self._beside_steps(lambda e: e.update_params(params, version=version, recompute=recompute))

    async def pause(self, mode: PauseMode = "keep") -> None:
        """See `Engine.pause`; requests that are submitted meanwhile wait."""
        await self._beside_steps(lambda e: e.pause(mode))

    async def resume(self) -> None:
        """See `Engine.resume`."""
        await self._beside_steps(lambda e: e.resume())

    async def release_memory(self, *, weights: WeightsPlace | None = "device") -> None:
        """See `Engine.release_memory`."""
        await self._beside_steps(lambda e: e.release_memory(weights=weights))

    async def restore_memory(self, params: Params | None = None, *, version: int | None = None) -> None:
        """See `Engine.restore_memory`."""
        await self._beside_steps(lambda e: e.restore_memory(params, version=version))

    async def score(
        self,
        tokens: Sequence[TokenIdsInput],
        params: SamplingParams | None = None,
        *,
        start: int | Sequence[int] = 1,
        num_top: int = 0,
    ) -> list[Scores]:
        """See `Engine.score`. Raises QueueFullError and ClosedError as `submit` does."""
        requests = await asyncio.to_thread(scoring_requests, self.intake, tokens, params, start=start, num_top=num_top)
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.submit(request))
            outputs = [[output async for output in stream] for stream in streams]
        finally:
            for stream in streams:
                stream.close()
        return [scores_of(request, output[-1]) for request, output in zip(requests, outputs, strict=True)]

    async def _beside_steps(self, function: Callable[[Engine], T]) -> T:
        """Returns `function(engine)`, run in a thread of its own; ClosedError if the engine's thread has ended."""
        if self._thread.has_ended:
            raise ClosedError(self.failure or "the engine's thread has ended")
        return await asyncio.to_thread(function, self._thread.engine)

    async def snapshots(self, *, since_step: int | None = None) -> list[JsonObject]:
        """The snapshot of the engine by `take_snapshot`, in a list of one; waits for the current step."""
        snapshot = await self.call(lambda engine: take_snapshot(engine, since_step=since_step))
        snapshot["counters"]["failed_steps"] = self.num_failed_steps
        return [snapshot]

    async def pool(self, texts: Sequence[TokenIds], pooling: Pooling, *, token_ids: tuple[int, ...] = ()) -> list[Pooled]:
        """The hidden states of texts; see `fastgen_jax.api.pooling.pool`. Runs between the steps of requests."""
        if not self.is_ready:
            raise ClosedError(self.failure or "this server accepts no more requests: it is shutting down")
        if self._num_pooling >= self.max_queue:
            raise QueueFullError(self._num_pooling, self.max_queue, 1.0)
        self._num_pooling += 1
        try:
            async with self._pooling:
                return await asyncio.to_thread(pool, self._engine, texts, pooling, token_ids=token_ids)
        finally:
            self._num_pooling -= 1

    async def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits until all have ended; False if some have not after `timeout` seconds."""
        self._closed = True
        if not self._thread.has_ended:
            await self.resume()  # requests that are paused can end only then
        end = time.monotonic() + timeout
        while self._streams and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._streams

    async def close(self) -> None:
        """Ends the thread; unfinished requests fail."""
        self._closed = True
        await asyncio.to_thread(self._thread.close)
        await asyncio.sleep(0)  # the thread handed over its last events before it ended
        while self._undelivered:
            await asyncio.sleep(0)

    def _hand_over(self, events: Sequence[Event]) -> None:
        """Called in the engine's thread: one wake-up of the event loop per step, for any number of requests."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[Event]) -> None:
        pending = bool(self._undelivered)  # then a call for the rest is scheduled already
        self._undelivered += events
        if not pending:
            self._deliver_some()

    def _deliver_some(self) -> None:
        """Each event wakes a task in the next turn of the loop; hundreds in one turn would delay all other tasks."""
        try:
            for _ in range(min(EVENTS_PER_TURN, len(self._undelivered))):
                event = self._undelivered.popleft()
                stream = self._streams.get(event.request_id)
                if stream is not None:
                    if isinstance(event, Failure) or event.finished:
                        del self._streams[event.request_id]
                    stream.put(event)
        finally:
            if self._undelivered:
                asyncio.get_running_loop().call_soon(self._deliver_some)

    def _on_stream_closed(self, stream: Stream) -> None:
        if self._streams.pop(stream.request.request_id, None) is not None:
            self._thread.abort(stream.request.request_id)


def _checked(event: Event) -> RequestOutput:
    if isinstance(event, Failure):
        raise RequestFailedError(event)
    if event.error is not None:
        raise RequestFailedError(Failure(event.request_id, "grammar", event.error))
    if event.finish_reason == "refused":
        message = "the first token would come later than this server promises; retry when it is less busy"
        raise RequestFailedError(Failure(event.request_id, "refused", message))
    return event


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.cancelled():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.cancelled():
        future.set_exception(error)
