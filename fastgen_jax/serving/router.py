"""Several replicas as one backend: each prompt goes to the replica that will finish it first."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from fastgen_jax.api.async_engine import EVENTS_PER_TURN, MAX_QUEUE, ClosedError, QueueFullError, Stream
from fastgen_jax.api.engine_thread import Event, Failure
from fastgen_jax.api.pooling import Pooled, Pooling
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.prompts import TokenIds
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.updating import PauseMode
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.scheduling import Request
from fastgen_jax.serving.frames import read
from fastgen_jax.serving.remote import ReplicaHandle, RoutedRequest, expected_work, prefix_pieces
from fastgen_jax.serving.replica import ReplicaPlan, share_machine
from fastgen_jax.serving.work import Snapshot
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

log = logging.getLogger(__name__)

Message = tuple[Any, ...]  # of a replica: its kind, then what belongs to it

MAX_STARTS = 3  # unsuccessful starts in a row after which a replica is given up
PAUSE_SECONDS = 2.0  # before the next start, times the number of starts in a row
HEALTHY_SECONDS = 60.0  # a start is successful if the replica runs for this long, or finishes a request
SUSPECT_DEATHS = 2  # of replicas while they ran a request: from then on no other suspect runs at the same time
SNAPSHOT_SECONDS = 5.0


class Router:
    """Replicas of one model on this machine; a backend like `AsyncEngine`.

    A replica that dies is restarted, and its requests run elsewhere. A partially answered request is computed again and
    continues where it stopped, because the same request generates the same tokens; if they differ, it fails. With
    `log_format` the replicas log as the server does, to standard error and to `log_file` if it is given.
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
        sleep_idle: float | None = None,
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
                sleep_idle=sleep_idle,
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
        self._suspects: list[RoutedRequest] = []  # waiting until that one ends
        self._closed = False
        self._idle = asyncio.Event()  # set when the last request ends
        self._numbers = itertools.count()
        self._supervisors: list[asyncio.Task[None]] = []
        self._failure: str | None = None
        self._changing = asyncio.Lock()  # held while weights are exchanged
        self._weights: dict[str, Any] | None = None  # what replaced those of the model
        self._is_paused = False
        self._catching_up: set[asyncio.Task[None]] = set()

    async def start(self) -> Router:
        """Starts the replicas; returns when all are ready or given up. ValueError if none is ready."""
        # One after another, because the first fills the compile cache for the others.
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
        """Validates and builds requests."""
        assert self._intake is not None  # `start` has returned
        return self._intake

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed and any(replica.is_ready for replica in self.replicas)

    @property
    def is_asleep(self) -> bool:
        """Whether every replica that is ready has given its memory back; the next request wakes one."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        return bool(ready) and all(replica.load.is_asleep for replica in ready)

    @property
    def failure(self) -> str | None:
        """Why no request can be answered anymore; None while replicas run or restart."""
        if not all(replica.is_given_up for replica in self.replicas):
            return None
        return f"every replica was given up after {MAX_STARTS} starts in a row: {self._failure or 'see the log'}"

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not ended."""
        return len(self._requests)

    def submit(
        self,
        request: Request,
        *,
        grammar: Grammar | None = None,
        matcher: GrammarMatcher | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """See `AsyncEngine.submit`; the replica makes its own matcher of a grammar."""
        if self._closed:
            raise ClosedError("this server accepts no more requests: it is shutting down")
        ready = [replica for replica in self.replicas if replica.is_ready]
        if not ready:
            raise ClosedError(self.failure or "no replica is ready; they are being restarted")
        waiting = min(replica.num_waiting for replica in ready)
        if waiting >= self.max_queue:
            raise QueueFullError(waiting, self.max_queue, min(replica.load.wait_seconds for replica in ready))
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already in use; choose another, or omit it")
        stream = Stream(request, self._on_stream_closed)
        pieces = prefix_pieces(request.prompt_token_ids, salt=request.cache_salt)
        routed = RoutedRequest(request, grammar, deadline, stream, pieces, expected_work(request))
        self._requests[request.request_id] = routed
        self._idle.clear()
        self._route(routed)
        return stream

    async def snapshots(self, *, since_step: int | None = None) -> list[Snapshot]:
        """Returns one snapshot per replica that answers."""
        waiting = []
        for replica in self.replicas:
            if replica.is_ready:
                waiting.append(asyncio.wait_for(self._ask(replica, "snapshot", since_step), SNAPSHOT_SECONDS))
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, dict)]

    async def update_params(self, params: str, *, version: int | None = None, recompute: bool = False) -> int:
        """Replaces the weights of every replica by those of a checkpoint; see `Engine.update_params`."""
        async with self._changing:
            following = 1 + (self._weights["version"] if self._weights else 0)
            number = following if version is None else version
            await self._call_all("update_params", params=params, version=number, recompute=recompute)
            self._weights = {"params": params, "version": number}
        return number

    async def pause(self, mode: PauseMode = "keep") -> None:
        """See `Engine.pause`."""
        self._is_paused = True
        await self._call_all("pause", mode=mode)

    async def resume(self) -> None:
        """See `Engine.resume`."""
        self._is_paused = False
        await self._call_all("resume")

    async def pool(self, texts: Sequence[TokenIds], pooling: Pooling, *, token_ids: tuple[int, ...] = ()) -> list[Pooled]:
        """See `AsyncEngine.pool`. One replica computes all texts of a call."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        if self._closed or not ready:
            raise ClosedError(self.failure or "no replica is ready; they are being restarted")
        replica = min(ready, key=lambda replica: (len(replica.answers), replica.work))
        if len(replica.answers) >= self.max_queue:
            raise QueueFullError(len(replica.answers), self.max_queue, 1.0)
        try:
            answer = await self._ask(replica, "pool", list(texts), pooling, token_ids)
        except asyncio.CancelledError:
            if replica.is_ready:  # not the replica, but the caller has gone
                raise
            raise ClosedError("the replica that computed this died; send it again") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, replica: ReplicaHandle, kind: str, *rest: object) -> asyncio.Future[Any]:
        """The future answer of a replica; cancelled if the replica ends."""
        number = next(self._numbers)
        future = replica.answers[number] = asyncio.get_running_loop().create_future()
        replica.write(kind, number, *rest)
        return future

    async def drain(self, timeout: float) -> bool:
        """Accepts no more requests and waits for the running ones; returns whether all ended in `timeout` seconds."""
        self._closed = True
        if self._is_paused:
            await self.resume()  # paused requests can end only then
        if self._requests:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)
        return not self._requests

    async def close(self) -> None:
        """Ends the replicas; unfinished requests fail."""
        self._closed = True
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        for replica in self.replicas:
            await replica.end()
        for routed in list(self._requests.values()):
            self._finish(routed, Failure(routed.request.request_id, "shutdown", "the server is shutting down"))

    async def _supervise(self, replica: ReplicaHandle, ready: asyncio.Event) -> None:
        """Starts a replica and reads its messages, again and again as it dies; sets `ready` when it is ready or given up."""
        try:
            while replica.num_starts < MAX_STARTS:
                reader = await replica.start()
                try:
                    while True:
                        for message in _parts(await read(reader)):
                            self._handle(replica, message, ready)
                            await asyncio.sleep(0)
                except (asyncio.IncompleteReadError, OSError):
                    pass
                code = await replica.end()
                if time.monotonic() - replica.started > HEALTHY_SECONDS:
                    replica.num_starts = 0
                interrupted = list(replica.requests.values())
                replica.requests.clear()
                log.warning(
                    "replica %d ended with exit code %s and %d unfinished requests", replica.number, code, len(interrupted)
                )
                for routed in interrupted:
                    self._reroute(routed)
                await asyncio.sleep(PAUSE_SECONDS * replica.num_starts)  # no pause after a successful start
            replica.is_given_up = True
            self._failure = self._failure or f"replica {replica.number} ended with exit code {code}"
            log.error("replica %d is given up after %d starts in a row: %s", replica.number, MAX_STARTS, self._failure)
            if self.failure is not None:
                for routed in list(self._requests.values()):
                    self._finish(routed, Failure(routed.request.request_id, "lost", self.failure))
        finally:
            ready.set()
            await replica.end()

    def _handle(self, replica: ReplicaHandle, message: Message, ready: asyncio.Event) -> None:
        kind, *rest = message
        if kind == "events":
            events, load = rest
            replica.update_load(load)
            self._deliver(replica, events)
        elif kind == "answer":
            number, answer = rest
            future = replica.answers.pop(number, None)
            if future is not None and not future.done():
                future.set_result(answer)
        elif kind == "ready":
            config: ResolvedConfig = rest[0]
            self._intake = self._intake or Intake(self._tokenizer, self._model_config, config)
            if self._weights is None and not self._is_paused and not self._changing.locked():
                self._admit(replica, ready)
            else:
                self._catching_up.add(task := asyncio.create_task(self._catch_up(replica, ready)))
                task.add_done_callback(self._catching_up.discard)
        else:  # "failed"
            self._failure = rest[0]
            replica.num_starts = MAX_STARTS  # it would fail each time

    def _admit(self, replica: ReplicaHandle, ready: asyncio.Event) -> None:
        replica.is_ready = True
        ready.set()
        unassigned, self._unassigned = self._unassigned, []
        for routed in unassigned:
            self._route(routed)

    async def _catch_up(self, replica: ReplicaHandle, ready: asyncio.Event) -> None:
        """Gives a replica that started again the weights and the pause of the others."""
        async with self._changing:
            try:
                calls = [("update_params", self._weights)] if self._weights is not None else []
                calls += [("pause", {"mode": "keep"})] if self._is_paused else []
                for name, options in calls:
                    answer = await self._ask(replica, "call", name, options)
                    if isinstance(answer, Exception):
                        raise answer
            except ValueError as error:
                self._failure = f"replica {replica.number} could not load the current weights: {error}"
                log.error("%s", self._failure)
                replica.write("stop")
            else:
                self._admit(replica, ready)

    async def _call_all(self, name: str, **options: object) -> None:
        """Calls a method of every engine; ValueError if one fails, which the others may not have."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        calls = [self._ask(replica, "call", name, options) for replica in ready]
        for replica, answer in zip(ready, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, Exception):
                where = f" (replica {replica.number})" if len(ready) > 1 else ""
                raise ValueError(f"{answer}{where}")
            if isinstance(answer, asyncio.CancelledError):
                log.warning("replica %d ended during %s; it catches up when it has started again", replica.number, name)

    def _route(self, routed: RoutedRequest) -> None:
        if routed.request.request_id not in self._requests:
            return  # its client has disconnected
        ready = [replica for replica in self.replicas if replica.is_ready]
        if not ready:
            self._unassigned.append(routed)
            return
        if routed.deaths >= SUSPECT_DEATHS and routed is not self._suspect:
            if self._suspect is not None:
                self._suspects.append(routed)
                return
            self._suspect = routed
        min(ready, key=lambda replica: (replica.cost(routed), replica.load.is_asleep)).send(routed)

    def _reroute(self, routed: RoutedRequest) -> None:
        """Runs a request whose replica died on another one, unless it has probably caused too many deaths."""
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
            if accepted is not event:  # the tokens differ from those delivered
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
        if not self._requests:
            self._idle.set()
        replica = next((replica for replica in self.replicas if request_id in replica.requests), None)
        if replica is not None:
            del replica.requests[request_id]
        if routed is self._suspect:
            self._suspect = None
            waiting, self._suspects = self._suspects, []
            for other in waiting:  # the first becomes the suspect
                self._route(other)
        return replica

    def _on_stream_closed(self, stream: Stream) -> None:
        routed = self._requests.get(stream.request.request_id)
        if routed is not None and routed.stream is stream:
            replica = self._forget(routed)
            if replica is not None:
                replica.write("abort", stream.request.request_id)


def _parts(message: Message) -> Iterator[Message]:
    """Splits a message that has more events than one turn of the event loop should handle."""
    if message[0] != "events":
        yield message
        return
    _, events, load = message
    for start in range(0, max(1, len(events)), EVENTS_PER_TURN):
        yield "events", events[start : start + EVENTS_PER_TURN], load
