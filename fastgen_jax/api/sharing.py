"""One engine for many callers: a thread steps it, and every caller reads the outputs of its own requests."""

from __future__ import annotations

import atexit
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

LOOK_EVERY = 1.0  # seconds: a reader who waits for long looks whether the thread is still there, and for signals
_EXIT_TIMEOUT = 10.0  # seconds that a step may still take when the program ends

_Batch = list[tuple[int, Event]]
_Place = tuple["queue.SimpleQueue[_Batch]", int]

_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _close_threads() -> None:
    """A program must not end while a thread computes: it would crash."""
    for thread in [*_threads]:
        thread.close(_EXIT_TIMEOUT)


class DestroyedError(ValueError):
    """The engine was destroyed."""


class SharedEngine:
    """An engine whose requests may come from any thread. Its own thread starts with the first of them.

    Nothing that runs there refers to this object: it ends with the last who holds it, and the thread with it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self.is_destroyed = False
        self._places: dict[str, _Place] = {}  # where the events of each unfinished request go
        self._thread: EngineThread | None = None
        self._starting = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine; DestroyedError if there is none any more."""
        engine = self._engine
        if engine is None or self.is_destroyed:
            raise DestroyedError("this pipeline was destroyed; make a new one with fastgen_jax.pipeline(model)")
        return engine

    def run(self, requests: Sequence[Request], *, on_finished: Callable[[RequestOutput], object] | None = None) -> Outputs:
        """Queues checked requests together and returns their outputs, to be read by one thread.

        `on_finished` is called with the last output of each, in that thread.
        """
        outputs = Outputs(self, requests, on_finished)
        try:
            outputs.start(self._running_thread(), self._places)
        except BaseException:
            outputs.close()
            raise
        return outputs

    def destroy(self) -> None:
        """Ends what runs, and frees weights and cache at once. Readers get DestroyedError."""
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
                _threads.add(self._thread)
                weakref.finalize(self, self._thread.stop).atexit = False
            return self._thread


class Outputs:
    """The outputs of some requests as (index of the request, output), in the order in which they come.

    A reader who is slow finds more of them when it comes: the engine does not wait for it. `close` ends what is
    unfinished, and so does an exception in `next`, and the end of this object. `next` raises DestroyedError if the engine
    was destroyed, and RuntimeError for a request that failed.
    """

    _thread: EngineThread | None = None  # also where an exception came into the constructor

    def __init__(
        self, shared: SharedEngine, requests: Sequence[Request], on_finished: Callable[[RequestOutput], object] | None
    ) -> None:
        self._on_finished = on_finished
        self._shared = shared  # which lives as long as somebody reads
        self._requests = requests
        self._queue: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._ready: deque[tuple[int, Event]] = deque()
        self._unfinished = {request.request_id for request in requests}
        self._places: dict[str, _Place] = {}

    def start(self, thread: EngineThread, places: dict[str, _Place]) -> None:
        """Sends the requests; for the one who makes this object."""
        self._thread, self._places = thread, places
        places.update((request.request_id, (self._queue, index)) for index, request in enumerate(self._requests))
        try:
            thread.submit_all(self._requests)
        except RuntimeError:
            _ = self._shared.engine  # if it was destroyed, that is what there is to say
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
        """Ends the requests that are unfinished, before the next step. Nothing follows."""
        if self._thread is None:  # nothing was sent
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
                return self._queue.get(timeout=LOOK_EVERY if alive else 0)
            except queue.Empty:
                if not alive:
                    raise RuntimeError("the engine's thread has ended without an answer; its log says why") from None

    def _error(self, event: Failure | RequestOutput) -> Exception:
        if isinstance(event, Failure):
            if event.kind != "shutdown":
                return RuntimeError(event.message)
            if self._shared.is_destroyed:
                return DestroyedError("this pipeline was destroyed while the request ran; make a new one")
            return RuntimeError("the engine's thread ended because of an error, which its log shows; send the request again")
        return RuntimeError(event.error)


class Stream:
    """The outputs of one request. `close` ends it early, as leaving the loop does."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        return next(self._outputs)[1]

    def close(self) -> None:
        """Ends the request if it is unfinished. Nothing follows."""
        self._outputs.close()


def _deliver(places: dict[str, _Place], events: Sequence[Event]) -> None:
    """Puts events, in the engine's thread, where their readers look: at most one wake-up of each a step."""
    batches: dict[queue.SimpleQueue[_Batch], _Batch] = {}
    for event in events:
        is_last = isinstance(event, Failure) or event.finished
        place = places.pop(event.request_id, None) if is_last else places.get(event.request_id)
        if place is not None:  # else its reader has left
            batches.setdefault(place[0], []).append((place[1], event))
    for reader, batch in batches.items():
        reader.put(batch)
