"""One engine for many callers: a thread steps it, and each caller reads the outputs of its own requests."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from fastgen_jax.api.engine_thread import EngineThread, Event, Failure
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.scheduling import Request
from fastgen_jax.text.grammar import GrammarMatcher

POLL_SECONDS = 1.0  # how often a waiting reader checks for signals and whether the thread is still alive

_Batch = list[tuple[int, Event]]
_Place = tuple["queue.SimpleQueue[_Batch]", int]


class DestroyedError(ValueError):
    """The engine was destroyed."""


class SharedEngine:
    """An engine that accepts requests from any thread and runs in a thread that starts with the first request.

    The thread holds no reference to this object: it ends when the last reference to this object does.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self.is_destroyed = False
        self._places: dict[str, _Place] = {}  # where to deliver the events of each unfinished request
        self._thread: EngineThread | None = None
        self._starting = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine; DestroyedError after `destroy`."""
        engine = self._engine
        if engine is None or self.is_destroyed:
            raise DestroyedError("this pipeline was destroyed; make a new one with fastgen_jax.pipeline(model)")
        return engine

    def run(
        self,
        requests: Sequence[Request],
        matchers: Sequence[GrammarMatcher] | None = None,
        *,
        on_finished: Callable[[RequestOutput], object] | None = None,
    ) -> Outputs:
        """Queues checked requests together and returns their outputs, to be read by one thread.

        `matchers` are those of requests with a grammar. `on_finished` is called with the last output of each request, in
        that thread.
        """
        outputs = Outputs(self, requests, matchers, on_finished)
        try:
            outputs.start(self._running_thread(), self._places)
        except BaseException:
            outputs.close()
            raise
        return outputs

    def destroy(self) -> None:
        """Ends all requests, and frees weights and cache immediately. Readers get DestroyedError."""
        with self._starting:
            self.is_destroyed = True
        try:
            if self._thread is not None:
                self._thread.close()
        finally:
            if self._engine is not None:
                self._engine.destroy()
        self._engine = self._thread = None

    def _running_thread(self) -> EngineThread:
        with self._starting:
            if self._thread is None or self._thread.has_ended:
                self._thread = EngineThread(self.engine, partial(_deliver, self._places))
                weakref.finalize(self, self._thread.stop).atexit = False
            return self._thread


class Outputs:
    """The outputs of some requests as (index of the request, output), in the order of their arrival.

    The engine does not wait for a slow reader: outputs accumulate. `close` ends unfinished requests, and so do an
    exception in `next` and the destruction of this object. `next` raises DestroyedError if the engine
    was destroyed, and RuntimeError for a request that failed.
    """

    _thread: EngineThread | None = None  # even if the constructor was interrupted

    def __init__(
        self,
        shared: SharedEngine,
        requests: Sequence[Request],
        matchers: Sequence[GrammarMatcher] | None,
        on_finished: Callable[[RequestOutput], object] | None,
    ) -> None:
        self._on_finished = on_finished
        self._shared = shared  # kept alive while there are readers
        self._requests = requests
        self._matchers = matchers
        self._queue: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._ready: deque[tuple[int, Event]] = deque()
        self._unfinished = {request.request_id for request in requests}
        self._places: dict[str, _Place] = {}

    def start(self, thread: EngineThread, places: dict[str, _Place]) -> None:
        """Submits the requests; for the creator of this object."""
        self._thread, self._places = thread, places
        places.update((request.request_id, (self._queue, index)) for index, request in enumerate(self._requests))
        try:
            thread.submit_all(self._requests, self._matchers)
        except RuntimeError:
            _ = self._shared.engine  # if it was destroyed, this raises a clearer error
            raise

    def __iter__(self) -> Outputs:
        return self

    def __next__(self) -> tuple[int, RequestOutput]:
        try:
            while not self._ready:
                if not self._unfinished:
                    raise StopIteration
                self._ready.extend(self._wait())
            index, event = self._ready.popleft()
            if isinstance(event, Failure) or event.error is not None:
                raise self._error(event)
            if event.finished:
                self._unfinished.discard(event.request_id)
                if self._on_finished is not None:
                    self._on_finished(event)
            return index, event
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends unfinished requests before the next step. No output follows."""
        if self._thread is None:  # nothing was submitted
            return
        unfinished, self._unfinished = self._unfinished, set()
        self._ready.clear()
        if unfinished:
            for request_id in unfinished:
                self._places.pop(request_id, None)
            self._thread.abort(*unfinished)

    def __del__(self) -> None:
        self.close()

    def _wait(self) -> _Batch:
        assert self._thread is not None
        while True:
            alive = self._thread.is_alive
            try:
                return self._queue.get(timeout=POLL_SECONDS if alive else 0)
            except queue.Empty:
                if not alive:
                    raise RuntimeError("the engine's thread ended without an answer; the log has the reason") from None

    def _error(self, event: Failure | RequestOutput) -> Exception:
        if isinstance(event, Failure):
            if event.kind != "shutdown":
                return RuntimeError(event.message)
            if self._shared.is_destroyed:
                return DestroyedError("this pipeline was destroyed while the request ran; make a new one")
            return RuntimeError("the engine's thread ended because of an error, which is in the log; send the request again")
        return RuntimeError(event.error)


class Stream:
    """The outputs of one request. `close` ends it early, and so does leaving the loop."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        return next(self._outputs)[1]

    def close(self) -> None:
        """Ends the request if it is unfinished. No output follows."""
        self._outputs.close()


def _deliver(places: dict[str, _Place], events: Sequence[Event]) -> None:
    """Delivers events to their readers, in the engine's thread: at most one wake-up of each reader per step."""
    batches: dict[queue.SimpleQueue[_Batch], _Batch] = {}
    for event in events:
        is_last = isinstance(event, Failure) or event.finished
        place = places.pop(event.request_id, None) if is_last else places.get(event.request_id)
        if place is not None:  # else its reader has closed it
            batches.setdefault(place[0], []).append((place[1], event))
    for reader, batch in batches.items():
        reader.put(batch)
