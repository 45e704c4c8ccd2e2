"""The router's view of a replica: its process, its requests, and the prefixes that it has probably cached."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any  # of answers: what the replica was asked for

from fastgen_jax.api.async_engine import Stream
from fastgen_jax.api.engine_thread import Event, Failure, Load
from fastgen_jax.scheduling import Request
from fastgen_jax.serving.frames import pack
from fastgen_jax.serving.replica import ReplicaPlan
from fastgen_jax.text.grammar import Grammar

EXPECTED_OUTPUT = 256  # tokens: upper limit of the estimated output of a request
PIECE = 64  # tokens: prefixes are remembered in pieces of this size
PIECES_REMEMBERED = 4096  # per replica: a quarter of a million tokens of prefixes
MAX_DEATHS = 3  # of replicas while they run a request: then the request probably causes them
GRACE_SECONDS = 1.0  # for a replica to end after its socket is closed


@dataclass(eq=False)
class RoutedRequest:
    """A request and its progress in the router."""

    request: Request
    grammar: Grammar | None
    deadline: float | None
    stream: Stream
    pieces: list[bytes]
    """See `prefix_pieces`."""
    work: int
    """Tokens that it is expected to need still."""
    delivered: list[int] = field(default_factory=list)
    """Token ids that the client has received."""
    replayed: int = 0
    """Number of delivered tokens that the current replica has sent again."""
    deaths: int = 0
    """Replicas that died while they ran it."""

    def note_replica_death(self) -> Failure | None:
        """Records that its replica died; returns the failure that ends the request after too many deaths."""
        self.replayed = 0
        self.deaths += 1
        if self.deaths < MAX_DEATHS:
            return None
        message = f"{self.deaths} replicas died while they ran this request; it is not retried"
        return Failure(self.request.request_id, "lost", message)

    def accept(self, event: Event) -> Event | None:
        """Returns the event for the client: None if it repeats delivered tokens, a failure if it contradicts them."""
        if isinstance(event, Failure):
            return event
        count = len(event.new_token_ids)
        self.work = max(1, self.work - count)
        if self.replayed == len(self.delivered):
            self.delivered += event.new_token_ids
            self.replayed = len(self.delivered)
            return event
        expected = tuple(self.delivered[self.replayed : self.replayed + count])
        self.replayed += count
        if event.new_token_ids == expected and not event.finished:
            return None
        message = "the replica that ran this request died, and another one generates different tokens; send it again"
        return Failure(self.request.request_id, "lost", message)


class PrefixMemory:
    """The prefixes that a replica has probably cached, by the hashes of `prefix_pieces`."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[bytes, None] = OrderedDict()

    def num_cached_tokens(self, pieces: Sequence[bytes]) -> int:
        """Returns how many tokens at the start of a prompt are probably cached."""
        return PIECE * next((i for i, piece in enumerate(pieces) if piece not in self._pieces), len(pieces))

    def add(self, pieces: Sequence[bytes]) -> None:
        """Records that the replica computes a prompt; forgets those that it computed long ago."""
        for piece in pieces:
            self._pieces[piece] = None
            self._pieces.move_to_end(piece)
        while len(self._pieces) > PIECES_REMEMBERED:
            self._pieces.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything."""
        self._pieces.clear()


class ReplicaHandle:
    """A replica as the router sees it."""

    def __init__(self, number: int, plan: ReplicaPlan) -> None:
        self.number = number
        self.plan = plan
        self.requests: dict[str, RoutedRequest] = {}
        self.load = Load()
        self.is_ready = False
        self.is_given_up = False
        self.num_starts = 0
        self.started = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._prefixes = PrefixMemory()
        self._new = 0  # submitted since the replica last reported its load

    @property
    def work(self) -> int:
        """Tokens that its requests are expected to need still."""
        return sum(routed.work for routed in self.requests.values())

    @property
    def num_waiting(self) -> int:
        """Estimated number of requests waiting in the replica."""
        return self.load.num_waiting + self._new

    def cost(self, routed: RoutedRequest) -> int:
        """Tokens of work until the request would be done there: the replica's queue and the part that is not cached."""
        return self.work + routed.work - self._prefixes.num_cached_tokens(routed.pieces)

    def send(self, routed: RoutedRequest) -> None:
        """Sends a request to the replica."""
        self.requests[routed.request.request_id] = routed
        self._new += 1
        self._prefixes.add(routed.pieces)
        self.write("submit", routed.request, routed.grammar, routed.deadline)

    def write(self, *message: object) -> None:
        """Sends a message if the replica's process is running."""
        if self._writer is not None:
            self._writer.write(pack(message))

    def update_load(self, load: Load) -> None:
        """Records the load that the replica reports."""
        if load.is_asleep:
            self._prefixes.clear()
        self.load = load
        self._new = 0

    async def start(self) -> asyncio.StreamReader:
        """Starts a new process; returns the reader of its messages."""
        ours, theirs = socket.socketpair()
        self.num_starts += 1
        self.started = time.monotonic()
        self._prefixes.clear()
        self.update_load(Load())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastgen_jax.serving.replica", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self.write_plan()
        return reader

    def write_plan(self) -> None:
        """Sends the plan to the process."""
        assert self._writer is not None
        self._writer.write(pack(self.plan))

    async def end(self) -> int | None:
        """Ends the process if it still runs; returns its exit code, negative for a signal, None if there was no process."""
        self.is_ready = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self.answers.values():
            future.cancel()
        self.answers.clear()
        if self.process is not None:
            process, self.process = self.process, None
            with contextlib.suppress(subprocess.TimeoutExpired):
                return await asyncio.to_thread(process.wait, GRACE_SECONDS)  # it ends when its socket closes
            process.kill()
            return await asyncio.to_thread(process.wait)
        return None


def expected_work(request: Request) -> int:
    """Returns the number of tokens that a request is expected to need: its prompt, and an answer of usual length."""
    return len(request.prompt_token_ids) + min(request.params.max_new_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT)


def prefix_pieces(token_ids: Sequence[int], *, salt: str = "") -> list[bytes]:
    """Returns the hashes of a prompt's prefixes of one piece, two pieces, and so on."""
    hashes, digest = [], hashlib.blake2b(salt.encode(), digest_size=8)
    for start in range(0, len(token_ids) - PIECE + 1, PIECE):
        digest.update(struct.pack(f"<{PIECE}i", *token_ids[start : start + PIECE]))
        hashes.append(digest.digest())
    return hashes
