"""The thread that runs an engine: commands in, events out; it never waits for clients."""

from __future__ import annotations

import atexit
import contextlib
import heapq
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.outputs import Outbox, RequestOutput
from fastgen_jax.scheduling import Request, SamplingParams
from fastgen_jax.text.grammar import GrammarMatcher

log = logging.getLogger(__name__)

ESTIMATE_EVERY = 0.25  # seconds; an estimate replays the queue, which takes a millisecond for a thousand waiting requests
STEP_TIME_DECAY = 0.9  # weight of the old value in the moving average of the step time
REFINE_IDLE = 30.0  # seconds without a request after which steps are timed
EXIT_TIMEOUT = 10.0  # seconds allowed for the current steps when the program ends

_living: weakref.WeakSet[EngineThread] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Ends all threads: a program that ends while a thread is in JAX crashes.

    Waits for the threads themselves, because one that has no `EngineThread` anymore may still be freeing its engine.
    """
    deadline = time.monotonic() + EXIT_TIMEOUT
    for engine_thread in [*_living]:
        engine_thread.stop()
    for thread in [*_threads]:
        thread.join(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a request that the engine could not finish."""

    request_id: str
    kind: Literal["deadline", "step", "shutdown", "lost", "refused", "grammar"]
    message: str
    retry_after: int | None = None
    """Seconds after which a retry makes sense, if known."""


Event = RequestOutput | Failure


@dataclass(frozen=True, slots=True)
class Load:
    """The load of an engine at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    wait_seconds: float = 0.0
    """Estimated time until a request that arrived now would have its first token."""
    is_asleep: bool = False
    """Whether the engine has given its memory back; the next request wakes it."""


class EngineThread:
    """Runs `engine` until `close`. All methods may be called from any thread; none of them waits for a step.

    It steps while requests that were submitted to it are unfinished; other threads may use the engine too.
    `deliver` gets the events of each step, in the engine's thread, and must return quickly; it gets no events when only
    `load` has changed. After `sleep_idle` seconds without a request the engine sleeps; the next one wakes it. After
    `refine_idle` seconds it times steps for the next start, if none were timed on this machine, and takes requests in
    between.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[Sequence[Event]], object],
        *,
        sleep_idle: float | None = None,
        refine_idle: float = REFINE_IDLE,
    ) -> None:
        self.engine = engine
        self.load = Load()
        self.num_failed_steps = 0
        self.has_ended = False
        """Whether no more requests are accepted, because it was closed or could not recover from an error."""
        self._deliver = deliver
        self._sleep_idle = sleep_idle
        self._refine_idle = refine_idle
        self._refine_at: float | None = 0.0  # when the engine wants to time a step; None: never again
        self._last_work = time.monotonic()
        self._box = Outbox()
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._deadlines: list[tuple[float, str]] = []
        self._events: list[Event] = []
        self._stopping = False
        self._step_seconds = 0.0
        self._next_estimate = 0.0
        self._publish()
        engine.wakers.append(self._nudge)
        self._thread = threading.Thread(target=self._run, name="fastgen-engine", daemon=True)
        _living.add(self)
        _threads.add(self._thread)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that are not running yet, including those that the engine has not received."""
        return self.load.num_waiting + self._inbox.qsize()

    def submit(self, request: Request, matcher: GrammarMatcher | None = None, *, deadline: float | None = None) -> None:
        """Queues a checked request; its events follow. `deadline` is in seconds of `time.monotonic`.

        Raises RuntimeError if the thread has ended.
        """
        self._inbox.put(lambda: self._add(request, matcher, deadline))
        self._check()

    def submit_all(self, requests: Sequence[Request], matchers: Sequence[GrammarMatcher] | None = None) -> None:
        """Queues checked requests together, so that the same step sees all of them; raises as `submit` does.

        `matchers` has one for each request with a grammar.
        """
        pairs = [(request, matchers[i] if matchers else None) for i, request in enumerate(requests)]
        self._inbox.put(lambda: [self._add(request, matcher, None) for request, matcher in pairs])
        self._check()

    def abort(self, *request_ids: str) -> None:
        """Ends requests before the next step, without further events; unknown ids are ignored.

        Never blocks, not even on a lock, so that a destructor may call it.
        """
        self._inbox.put(lambda: [self.engine.abort(request_id) for request_id in request_ids])

    def _nudge(self) -> None:
        """Makes the thread look for work, if it waits for commands."""
        self._inbox.put(lambda: None)

    def call(self, function: Callable[[Engine], object]) -> None:
        """Runs `function` between two steps. Raises RuntimeError if the thread has ended."""
        self._inbox.put(lambda: function(self.engine))
        self._check()

    @property
    def is_alive(self) -> bool:
        """Whether events may still arrive; true for a moment after `has_ended`."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def stop(self) -> None:
        """Makes the thread end after the current step, without waiting for it; like `abort`, usable in a destructor."""
        self._inbox.put(self._stop)

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread after the current step and waits; unfinished requests get a `Failure`."""
        self.stop()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._take_commands(wait=not self._has_work)
                    self._sleep_if_idle()
                    self._refine_if_idle()
                    self._expire()
                    if self._has_work and not self._stopping:
                        self._step()
                except BaseException as error:  # the thread must survive: without it every client would hang
                    self._recover(error)
                was_asleep = self.load.is_asleep
                self._publish()
                self._hand_over(even_nothing=self.load.is_asleep != was_asleep)
        except Exception:
            log.exception("the engine could not recover; it accepts no more requests")
        finally:
            self.has_ended = True
            with contextlib.suppress(ValueError):
                self.engine.wakers.remove(self._nudge)
            self._take_last_commands()  # commands that arrived in the meantime must fail too
            self._fail(self.engine.requests_of(self._box), "shutdown", "the server is shutting down")
            self._events += self._box.outputs  # of requests that ended without a step
            self._box.outputs = []
            self._publish()
            self._hand_over()

    def _take_commands(self, *, wait: bool) -> None:
        while True:
            try:
                command = self._inbox.get(block=wait, timeout=self._seconds_idle if wait else None)
            except queue.Empty:
                return
            command()
            wait = False

    def _take_last_commands(self) -> None:
        while True:
            try:
                return self._take_commands(wait=False)
            except Exception:
                log.exception("a command failed after the end")

    def _check(self) -> None:
        # Checked after the command was queued, to detect a command that came after the inbox was last read.
        if self.has_ended:
            raise RuntimeError("the engine's thread has ended")

    def _stop(self) -> None:
        self._stopping = True

    @property
    def _seconds_awake(self) -> float | None:
        """Seconds until the engine sleeps if nothing happens; None: it does not."""
        if self._sleep_idle is None or self.engine.is_asleep:
            return None
        return max(0.0, self._last_work + self._sleep_idle - time.monotonic())

    @property
    def _seconds_to_refine(self) -> float | None:
        """Seconds until a step is timed if nothing happens; None: none is."""
        if self._refine_at is None or self.engine.is_asleep:
            return None
        return max(0.0, max(self._last_work + self._refine_idle, self._refine_at) - time.monotonic())

    @property
    def _seconds_idle(self) -> float | None:
        """Seconds for which there is nothing to do without a command; None: any number."""
        due = [self._seconds_awake, self._seconds_to_refine]
        if self._deadlines:  # of requests that are paused
            due.append(max(0.0, self._deadlines[0][0] - time.monotonic()))
        return min((seconds for seconds in due if seconds is not None), default=None)

    def _refine_if_idle(self) -> None:
        if not self._has_work and self._seconds_to_refine == 0.0:
            pause = self.engine.refine()
            self._refine_at = None if pause is None else time.monotonic() + pause

    def _sleep_if_idle(self) -> None:
        if self._has_work:
            self._last_work = time.monotonic()
        elif self._seconds_awake == 0.0:
            self._last_work = time.monotonic()  # if it is busy with the requests of others, try again later
            if not self.engine.has_work and not self.engine.request_ids:
                with contextlib.suppress(ValueError):
                    self.engine.release_memory(weights=None)

    def _add(self, request: Request, matcher: GrammarMatcher | None, deadline: float | None) -> None:
        self._last_work = time.monotonic()
        try:
            self.engine.add_request(request, matcher, box=self._box)
        except Exception as error:  # a ValueError, or an error of the device
            self._events.append(Failure(request.request_id, "step", str(error)))
            return
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, request.request_id))

    def _expire(self) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            self._fail([request_id], "deadline", "the deadline of the request passed before it was finished")
        if not self._has_work and not self.engine.is_paused:
            self._deadlines.clear()

    @property
    def _has_work(self) -> bool:
        return self.engine.has_work_for(self._box)

    def _step(self) -> None:
        start = time.monotonic()
        self._events += self.engine.step(self._box)
        seconds = time.monotonic() - start
        self._step_seconds += (1 - STEP_TIME_DECAY if self._step_seconds else 1) * (seconds - self._step_seconds)

    def _recover(self, error: BaseException) -> None:
        self.num_failed_steps += 1
        log.exception("a step failed; its requests end, all others continue")
        ended = self.engine.recover(self._box)
        message = f"the step that computed this request failed ({type(error).__name__}: {error}); send it again"
        self._events += [Failure(request_id, "step", message) for request_id in ended]

    def _fail(self, request_ids: Sequence[str], kind: Literal["deadline", "shutdown"], message: str) -> None:
        self._events += [Failure(i, kind, message) for i in request_ids if self.engine.abort(i)]

    def _hand_over(self, *, even_nothing: bool = False) -> None:
        if self._events or even_nothing:
            events, self._events = self._events, []
            try:
                self._deliver(events)
            except Exception:
                log.exception("events could not be delivered")

    def _publish(self) -> None:
        engine, old, now = self.engine, self.load, time.monotonic()
        wait = old.wait_seconds if engine.num_waiting else 0.0
        if engine.num_waiting and now >= self._next_estimate:
            probe = Request(
                request_id="probe", prompt_token_ids=(0,), params=SamplingParams(max_new_tokens=1), arrival_time=now, seed=0
            )
            wait = engine.scheduler.estimate_wait(probe) * self._step_seconds
            self._next_estimate = now + ESTIMATE_EVERY
        self.load = Load(
            engine.num_running,
            engine.num_waiting,
            engine.config.num_blocks,
            engine.scheduler.num_free_blocks,
            wait,
            engine.is_asleep,
        )
