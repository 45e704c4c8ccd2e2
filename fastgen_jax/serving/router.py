"""Several replicas as one backend: each prompt goes where the least work lies before it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import socket
import struct
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastgen_jax.api.async_engine import MAX_QUEUE, ClosedError, QueueFullError, Stream
from fastgen_jax.api.engine_thread import Event, Failure, Load
from fastgen_jax.engine.config import EngineConfig, ResolvedConfig
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.scheduling import Request
from fastgen_jax.serving.frames import pack, read
from fastgen_jax.serving.replica import ReplicaPlan, share_machine
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

log = logging.getLogger(__name__)

PIECE = 64  # tokens: prefixes are remembered in pieces of this size
PIECES_REMEMBERED = 4096  # a replica; a quarter of a million tokens of prefixes
EXPECTED_OUTPUT = 256  # tokens: the most that a request is counted with before it has generated them
MAX_STARTS = 3  # in a row without becoming ready: then a replica is given up
SNAPSHOT_SECONDS = 5.0


@dataclass(eq=False)
class Ticket:
    """A request on its way through the router."""

    request: Request
    grammar: Grammar | None
    deadline: float | None
    stream: Stream
    pieces: list[bytes]
    work: int
    """Tokens that it is expected to cost still."""
    delivered: list[int] = field(default_factory=list)
    """Token ids that the client has."""
    replayed: int = 0
    """How many of them the replica that runs it now has sent again."""


class Replica:
    """The router's end of a replica."""

    def __init__(self, number: int, plan: ReplicaPlan) -> None:
        self.number = number
        self.plan = plan
        self.tickets: dict[str, Ticket] = {}
        self.load = Load()
        self.is_ready = False
        self.num_starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.snapshots: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._prefixes: OrderedDict[bytes, None] = OrderedDict()
        self._new = 0  # submitted since the last load was heard

    @property
    def work(self) -> int:
        """Tokens that its requests are expected to cost still."""
        return sum(ticket.work for ticket in self.tickets.values())

    @property
    def num_waiting(self) -> int:
        """Requests that wait there, as far as is known here."""
        return self.load.num_waiting + self._new

    def cost(self, ticket: Ticket) -> int:
        """Tokens of work before the request would be done there: what lies there, and what of it is not cached."""
        cached = next((i for i, piece in enumerate(ticket.pieces) if piece not in self._prefixes), len(ticket.pieces))
        return self.work + ticket.work - cached * PIECE

    def send(self, ticket: Ticket) -> None:
        """Gives a request to the replica."""
        self.tickets[ticket.request.request_id] = ticket
        self._new += 1
        for piece in ticket.pieces:
            self._prefixes[piece] = None
            self._prefixes.move_to_end(piece)
        while len(self._prefixes) > PIECES_REMEMBERED:
            self._prefixes.popitem(last=False)
        self.write("submit", ticket.request, ticket.grammar, ticket.deadline)

    def write(self, *message: Any) -> None:
        """Sends a message, if there is anybody to hear it."""
        if self._writer is not None:
            self._writer.write(pack(message))

    def heard(self, load: Load) -> None:
        """Notes what the replica says about its load."""
        self.load = load
        self._new = 0

    async def start(self) -> asyncio.StreamReader:
        """A fresh process; returns where to read its messages."""
        ours, theirs = socket.socketpair()
        self.num_starts += 1
        self._prefixes.clear()
        self.heard(Load())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastgen_jax.serving.replica", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self.write_plan()
        return reader

    def write_plan(self) -> None:
        """Tells the process what to run."""
        assert self._writer is not None
        self._writer.write(pack(self.plan))

    async def end(self) -> None:
        """Lets go of the process, dead or alive."""
        self.is_ready = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self.snapshots.values():
            future.cancel()
        self.snapshots.clear()
        if self.process is not None:
            process, self.process = self.process, None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.to_thread(process.wait)


class Router:
    """Replicas of one model on this machine; a backend like `AsyncEngine`.

    A replica that dies is started again, and its requests run elsewhere. A request that had been answered in part is
    computed again and goes on where it was, because the same request gives the same tokens; should they differ, it fails.
    """

    def __init__(
        self, model: str, engine: EngineConfig, tokenizer: Tokenizer, model_config: ModelConfig, *, replicas: int,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.max_queue = max_queue
        self._tokenizer, self._model_config = tokenizer, model_config
        self._intake: Intake | None = None
        plans = [ReplicaPlan(model=model, engine=asdict(engine), environment=environment, cpus=cpus)
                 for environment, cpus in share_machine(replicas)]
        self.replicas = [Replica(number, plan) for number, plan in enumerate(plans)]
        self.num_rerun = 0
        self._tickets: dict[str, Ticket] = {}
        self._homeless: list[Ticket] = []
        self._closed = False
        self._numbers = itertools.count()
        self._keepers: list[asyncio.Task[None]] = []
        self._failure: str | None = None

    async def start(self) -> Router:
        """Starts the replicas and returns when all are ready or given up; ValueError if none is ready."""
        # One after another: the first fills the compile cache that the others read.
        try:
            for replica in self.replicas:
                ready = asyncio.Event()
                self._keepers.append(asyncio.create_task(self._keep(replica, ready)))
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
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    def submit(
        self, request: Request, *, grammar: Grammar | None = None, matcher: GrammarMatcher | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """See `AsyncEngine.submit`; the matcher of a grammar is made where the request runs."""
        if self._closed:
            raise ClosedError("this server takes no more requests: it is shutting down")
        ready = [replica for replica in self.replicas if replica.is_ready]
        if not ready:
            raise ClosedError("no replica is ready; they are being started again")
        waiting = min(replica.num_waiting for replica in ready)
        if waiting >= self.max_queue:
            raise QueueFullError(waiting, self.max_queue, min(replica.load.wait_seconds for replica in ready))
        if request.request_id in self._tickets:
            raise ValueError(f"request id {request.request_id!r} is already in use; choose another, or leave it out")
        stream = Stream(request, self._on_stream_closed)
        limit = request.params.max_new_tokens or EXPECTED_OUTPUT
        work = len(request.prompt_token_ids) + min(limit, EXPECTED_OUTPUT)
        ticket = Ticket(request, grammar, deadline, stream, prefix_pieces(request.prompt_token_ids), work)
        self._tickets[request.request_id] = ticket
        self._route(ticket)
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
        while self._tickets and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._tickets

    async def close(self) -> None:
        """Ends the replicas; requests that are unfinished fail."""
        self._closed = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for replica in self.replicas:
            await replica.end()
        for ticket in list(self._tickets.values()):
            self._finish(ticket, Failure(ticket.request.request_id, "shutdown", "the server is shutting down"))

    async def _keep(self, replica: Replica, first: asyncio.Event) -> None:
        """Starts a replica, listens to it, and does it again when it dies."""
        try:
            while replica.num_starts < MAX_STARTS:
                reader = await replica.start()
                try:
                    while True:
                        self._take(replica, await read(reader), first)
                except (asyncio.IncompleteReadError, OSError):
                    pass
                was_ready = replica.is_ready
                log.warning("replica %d ended with %d requests; it is started again", replica.number, len(replica.tickets))
                await replica.end()
                orphans = list(replica.tickets.values())
                replica.tickets.clear()
                for ticket in orphans:
                    self.num_rerun += 1
                    ticket.replayed = 0
                    self._route(ticket)
                if not was_ready:
                    await asyncio.sleep(0.5 * replica.num_starts)
            log.error("replica %d is given up after %d starts: %s", replica.number, MAX_STARTS, self._failure)
            if not any(other.is_ready or other.num_starts < MAX_STARTS for other in self.replicas):
                for ticket in list(self._tickets.values()):
                    self._finish(ticket, Failure(ticket.request.request_id, "lost", "all replicas have failed"))
        finally:
            first.set()
            await replica.end()

    def _take(self, replica: Replica, message: tuple[Any, ...], first: asyncio.Event) -> None:
        kind, *rest = message
        if kind == "events":
            events, load = rest
            replica.heard(load)
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
            replica.num_starts = 0
            first.set()
            homeless, self._homeless = self._homeless, []
            for ticket in homeless:
                self._route(ticket)
        else:  # "failed"
            self._failure = rest[0]
            replica.num_starts = MAX_STARTS  # it would fail again

    def _route(self, ticket: Ticket) -> None:
        if ticket.request.request_id not in self._tickets:
            return  # its client has gone
        ready = [replica for replica in self.replicas if replica.is_ready]
        if ready:
            min(ready, key=lambda replica: replica.cost(ticket)).send(ticket)
        else:
            self._homeless.append(ticket)

    def _deliver(self, replica: Replica, events: Sequence[Event]) -> None:
        for event in events:
            ticket = replica.tickets.get(event.request_id)
            if ticket is None:
                continue
            if isinstance(event, Failure):
                self._finish(ticket, event)
                continue
            ticket.work = max(1, ticket.work - len(event.new_token_ids))
            if ticket.replayed < len(ticket.delivered):
                self._replay(ticket, event)
                continue
            ticket.delivered += event.new_token_ids
            ticket.replayed = len(ticket.delivered)
            if event.finished:
                self._finish(ticket, event)
            else:
                ticket.stream.put(event)

    def _replay(self, ticket: Ticket, event: RequestOutput) -> None:
        """Compares what is computed again with what the client has."""
        count = len(event.new_token_ids)
        expected = tuple(ticket.delivered[ticket.replayed : ticket.replayed + count])
        ticket.replayed += count
        if event.new_token_ids != expected or event.finished:
            message = "the replica that ran this request died, and another does not give the same tokens; send it again"
            self._finish(ticket, Failure(event.request_id, "lost", message))

    def _finish(self, ticket: Ticket, event: Event) -> None:
        self._forget(ticket)
        ticket.stream.put(event)

    def _forget(self, ticket: Ticket) -> Replica | None:
        request_id = ticket.request.request_id
        self._tickets.pop(request_id, None)
        home = next((replica for replica in self.replicas if request_id in replica.tickets), None)
        if home is not None:
            del home.tickets[request_id]
        return home

    def _on_stream_closed(self, stream: Stream) -> None:
        ticket = self._tickets.get(stream.request.request_id)
        if ticket is not None and ticket.stream is stream:
            home = self._forget(ticket)
            if home is not None:
                home.write("abort", stream.request.request_id)


def prefix_pieces(token_ids: Sequence[int]) -> list[bytes]:
    """The names of a prompt's prefixes of one piece, two pieces, ..."""
    names, digest = [], hashlib.blake2b(digest_size=8)
    for start in range(0, len(token_ids) - PIECE + 1, PIECE):
        digest.update(struct.pack(f"<{PIECE}i", *token_ids[start : start + PIECE]))
        names.append(digest.digest())
    return names
