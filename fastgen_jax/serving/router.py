"""Several replicas as one backend: each prompt goes where the least work lies before it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from fastgen_jax.api.async_engine import EVENTS_A_TURN, MAX_QUEUE, ClosedError, QueueFullError, Stream
from fastgen_jax.api.engine_thread import Event, Failure
from fastgen_jax.engine.config import EngineConfig, ResolvedConfig
from fastgen_jax.engine.intake import Intake
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.scheduling import Request
from fastgen_jax.serving.frames import read
from fastgen_jax.serving.remote import ReplicaHandle, RoutedRequest, prefix_pieces
from fastgen_jax.serving.replica import ReplicaPlan, share_machine
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

log = logging.getLogger(__name__)

EXPECTED_OUTPUT = 256  # tokens: the most that a request is counted with before it has generated them
MAX_STARTS = 3  # in a row that came to nothing: then a replica is given up
PAUSE_SECONDS = 2.0  # before the next start, times the starts in a row
HEALTHY_SECONDS = 60.0  # a replica that lived so long, or finished a request, has come to something
SUSPECT_DEATHS = 2  # replicas that died under a request: no other suspect runs beside it, so that the guilty one is found
SNAPSHOT_SECONDS = 5.0


class Router:
    """Replicas of one model on this machine; a backend like `AsyncEngine`.

    A replica that dies is started again, and its requests run elsewhere. A request that had been answered in part is
    computed again and goes on where it was, because the same request gives the same tokens; should they differ, it fails.
    With `log_format` they log as the server does, to standard error and to `log_file` if there is one.
    """

    def __init__(
        self,
        model: str,
        engine: EngineConfig,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        *,
        replicas: int,
        max_queue: int = MAX_QUEUE,
        log_format: Literal["text", "json"] | None = None,
        log_file: str | None = None,
    ) -> None:
        self.max_queue = max_queue
        self._tokenizer, self._model_config = tokenizer, model_config
        self._intake: Intake | None = None
        plans = [
            ReplicaPlan(
                model=model,
                engine=asdict(engine),
                environment=environment,
                cpus=cpus,
                name=f"replica {number}",
                log_format=log_format,
                log_file=log_file,
            )
            for number, (environment, cpus) in enumerate(share_machine(replicas))
        ]
        self.replicas = [ReplicaHandle(number, plan) for number, plan in enumerate(plans)]
        self._requests: dict[str, RoutedRequest] = {}
        self._unassigned: list[RoutedRequest] = []
        self._suspect: RoutedRequest | None = None
        self._suspects: list[RoutedRequest] = []  # wait for the end of that one
        self._closed = False
        self._numbers = itertools.count()
        self._supervisors: list[asyncio.Task[None]] = []
        self._failure: str | None = None

    async def start(self) -> Router:
        """Starts the replicas and returns when all are ready or given up; ValueError if none is ready."""
        # One after another: the first fills the compile cache that the others read.
        try:
            for replica in self.replicas:
                ready = asyncio.Event()
                self._supervisors.append(asyncio.create_task(self._supervise(replica, ready)))
                await ready.wait()
                if not replica.is_ready:
                    break
        except asyncio.CancelledError:
            await self.close()
            raise
        if not any(replica.is_ready for replica in self.replicas):
            await self.close()
            raise ValueError(self._failure or "no replica became ready")
        return self

    @property
    def intake(self) -> Intake:
        """Makes checked requests."""
        assert self._intake is not None  # `start` has returned
        return self._intake

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken."""
        return not self._closed and any(replica.is_ready for replica in self.replicas)

    @property
    def failure(self) -> str | None:
        """Why no request will ever be answered again; None while there is hope."""
        if not all(replica.is_given_up for replica in self.replicas):
            return None
        return f"every replica was given up after {MAX_STARTS} starts in a row: {self._failure or 'see the log'}"

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def submit(
        self,
        request: Request,
        *,
        grammar: Grammar | None = None,
        matcher: GrammarMatcher | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """See `AsyncEngine.submit`; the matcher of a grammar is made where the request runs."""
        if self._closed:
            raise ClosedError("this server takes no more requests: it is shutting down")
        ready = [replica for replica in self.replicas if replica.is_ready]
        if not ready:
            raise ClosedError(self.failure or "no replica is ready; they are being started again")
        waiting = min(replica.num_waiting for replica in ready)
        if waiting >= self.max_queue:
            raise QueueFullError(waiting, self.max_queue, min(replica.load.wait_seconds for replica in ready))
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already in use; choose another, or leave it out")
        stream = Stream(request, self._on_stream_closed)
        limit = request.params.max_new_tokens or EXPECTED_OUTPUT
        work = len(request.prompt_token_ids) + min(limit, EXPECTED_OUTPUT)
        routed = RoutedRequest(request, grammar, deadline, stream, prefix_pieces(request.prompt_token_ids), work)
        self._requests[request.request_id] = routed
        self._route(routed)
        return stream

    async def snapshots(self, *, since_step: int | None = None) -> list[dict[str, Any]]:
        """One a replica that answers."""
        waiting = []
        for replica in self.replicas:
            if replica.is_ready:
                number = next(self._numbers)
                future = replica.snapshots[number] = asyncio.get_running_loop().create_future()
                replica.write("snapshot", number, since_step)
                waiting.append(asyncio.wait_for(future, SNAPSHOT_SECONDS))
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, dict)]

    async def drain(self, timeout: float) -> bool:
        """Takes no more requests and waits until all have ended; False if some have not after `timeout` seconds."""
        self._closed = True
        end = time.monotonic() + timeout
        while self._requests and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._requests

    async def close(self) -> None:
        """Ends the replicas; requests that are unfinished fail."""
        self._closed = True
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        for replica in self.replicas:
            await replica.end()
        for routed in list(self._requests.values()):
            self._finish(routed, Failure(routed.request.request_id, "shutdown", "the server is shutting down"))

    async def _supervise(self, replica: ReplicaHandle, first: asyncio.Event) -> None:
        """Starts a replica, listens to it, and does it again when it dies."""
        try:
            while replica.num_starts < MAX_STARTS:
                reader = await replica.start()
                try:
                    while True:
                        for message in _parts(await read(reader)):
                            self._take(replica, message, first)
                            await asyncio.sleep(0)
                except (asyncio.IncompleteReadError, OSError):
                    pass
                code = await replica.end()
                if time.monotonic() - replica.started > HEALTHY_SECONDS:
                    replica.num_starts = 0
                interrupted = list(replica.requests.values())
                replica.requests.clear()
                log.warning("replica %d ended with code %s and %d requests", replica.number, code, len(interrupted))
                for routed in interrupted:
                    self._reroute(routed)
                await asyncio.sleep(PAUSE_SECONDS * replica.num_starts)  # none after one that had come to something
            replica.is_given_up = True
            self._failure = self._failure or f"replica {replica.number} ended with code {code}"
            log.error("replica %d is given up after %d starts in a row: %s", replica.number, MAX_STARTS, self._failure)
            if self.failure is not None:
                for routed in list(self._requests.values()):
                    self._finish(routed, Failure(routed.request.request_id, "lost", self.failure))
        finally:
            first.set()
            await replica.end()

    def _take(self, replica: ReplicaHandle, message: tuple[Any, ...], first: asyncio.Event) -> None:
        kind, *rest = message
        if kind == "events":
            events, load = rest
            replica.update_load(load)
            self._deliver(replica, events)
        elif kind == "snapshot":
            number, snapshot = rest
            future = replica.snapshots.pop(number, None)
            if future is not None and not future.done():
                future.set_result(snapshot)
        elif kind == "ready":
            config: ResolvedConfig = rest[0]
            self._intake = self._intake or Intake(self._tokenizer, self._model_config, config)
            replica.is_ready = True
            first.set()
            unassigned, self._unassigned = self._unassigned, []
            for routed in unassigned:
                self._route(routed)
        else:  # "failed"
            self._failure = rest[0]
            replica.num_starts = MAX_STARTS  # it would fail again

    def _route(self, routed: RoutedRequest) -> None:
        if routed.request.request_id not in self._requests:
            return  # its client has gone
        ready = [replica for replica in self.replicas if replica.is_ready]
        if not ready:
            self._unassigned.append(routed)
            return
        if routed.deaths >= SUSPECT_DEATHS and routed is not self._suspect:
            if self._suspect is not None:
                self._suspects.append(routed)
                return
            self._suspect = routed
        min(ready, key=lambda replica: replica.cost(routed)).send(routed)

    def _reroute(self, routed: RoutedRequest) -> None:
        """Finds another home for a request whose replica died, unless it is probably what killed it."""
        failure = routed.note_replica_death()
        if failure is None:
            self._route(routed)
        else:
            self._finish(routed, failure)

    def _deliver(self, replica: ReplicaHandle, events: Sequence[Event]) -> None:
        for event in events:
            routed = replica.requests.get(event.request_id)
            if routed is None:
                continue
            accepted = routed.accept(event)
            if accepted is None:
                continue
            if accepted is not event:  # it came out differently
                replica.write("abort", event.request_id)
            if isinstance(accepted, Failure) or accepted.finished:
                replica.num_starts = 0
                self._finish(routed, accepted)
            else:
                routed.stream.put(accepted)

    def _finish(self, routed: RoutedRequest, event: Event) -> None:
        self._forget(routed)
        routed.stream.put(event)

    def _forget(self, routed: RoutedRequest) -> ReplicaHandle | None:
        request_id = routed.request.request_id
        self._requests.pop(request_id, None)
        home = next((replica for replica in self.replicas if request_id in replica.requests), None)
        if home is not None:
            del home.requests[request_id]
        if routed is self._suspect:
            self._suspect = None
            waiting, self._suspects = self._suspects, []
            for other in waiting:  # the first of them is the next
                self._route(other)
        return home

    def _on_stream_closed(self, stream: Stream) -> None:
        routed = self._requests.get(stream.request.request_id)
        if routed is not None and routed.stream is stream:
            home = self._forget(routed)
            if home is not None:
                home.write("abort", stream.request.request_id)


def _parts(message: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """A message, in pieces if it has more events than a turn of the event loop should handle."""
    if message[0] != "events":
        yield message
        return
    _, events, load = message
    for start in range(0, max(1, len(events)), EVENTS_A_TURN):
        yield "events", events[start : start + EVENTS_A_TURN], load
