"""Clients of an OpenAI-compatible server: sends a load over streaming HTTP, from one process or several.

A chunk is timestamped when it arrives and parsed only when its request is complete, so that a client uses little CPU time
while others wait for their next token.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from fastgen_jax.bench.loads import Load, LoadRequest
from fastgen_jax.bench.metrics import RequestTimes
from fastgen_jax.json_types import JsonObject

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.sharedctypes import Synchronized
    from multiprocessing.synchronize import Barrier

TIMEOUT = 1800.0  # seconds without data after which a request has failed
REFUSED = (429, 503)  # HTTP status of a server that is overloaded
_COMMON = """
the of and to in a is that for it as was with be by on not he his but at are this have from or
had an they which one you were all her she there would their we him been has when who will no more if out so up said
"""
WORDS = _COMMON.split()  # each is one token in most vocabularies


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server that receives the requests, and how prompts are sent."""

    url: str
    """Address up to and including /v1."""
    model: str
    api_key: str = ""
    extra: JsonObject = field(default_factory=dict)
    """Additional fields of every request, such as ignore_eos."""
    as_text: bool = False
    """Whether prompts are sent as words, for servers that accept no token ids; lengths are then counted by the server."""
    vocab_size: int = 32_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a load. Times are those of `time.perf_counter`, which all processes of a machine share."""

    begin: float
    finished: list[RequestTimes]
    refused: list[str]
    failed: dict[str, str]
    """Request id -> error."""
    cpu_seconds: float
    """CPU time used by the clients."""


def run_load(target: Target, load: Load, *, num_processes: int = 1) -> Outcome:
    """Sends `load` to a server from `num_processes` processes; raises RuntimeError if one of them fails.

    Clients, or the arrivals of an open loop, are distributed over the processes round-robin; the queue of a closed loop is
    shared. Raises ValueError if httpx is missing or if there are more processes than clients.
    """
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise ValueError("the client needs httpx; pip install 'fastgen_jax[bench]'") from error
    limit = load.num_clients or len(load.requests)
    if not 1 <= num_processes <= limit:
        raise ValueError(f"num_processes is {num_processes}; use 1 to {limit}, the number of clients")
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Value("d", 0.0), context.Barrier(num_processes))
    if num_processes == 1:
        return asyncio.run(_Client(0, 1, target, load, shared).run())
    processes: list[BaseProcess] = []
    pending: list[Connection] = []
    parts: list[Outcome] = []
    try:
        for i in range(num_processes):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(i, num_processes, target, load, shared, writer), daemon=True)
            process.start()
            writer.close()  # the process has the only copy, so that its death ends the pipe
            processes.append(process)
            pending.append(reader)
        while pending:
            for reader in wait(pending):
                assert isinstance(reader, Connection)
                try:
                    part = reader.recv()
                except EOFError:
                    raise RuntimeError("a client process died; see its message above") from None
                if isinstance(part, str):
                    raise RuntimeError(f"a client process failed: {part}")
                parts.append(part)
                pending.remove(reader)
                reader.close()
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for reader in pending:
            reader.close()
    return Outcome(
        begin=shared.begin.value,
        finished=sorted((r for part in parts for r in part.finished), key=lambda r: r.start),
        refused=[name for part in parts for name in part.refused],
        failed={name: why for part in parts for name, why in part.failed.items()},
        cpu_seconds=sum(part.cpu_seconds for part in parts),
    )


@dataclass(frozen=True)
class _Shared:
    """State shared by the processes: the head of the queue, the start time, and a barrier."""

    head: Synchronized[int]
    begin: Synchronized[float]
    barrier: Barrier

    def next(self, count: int) -> int | None:
        """The index of the next request of the shared queue; None when all are taken."""
        with self.head.get_lock():
            if self.head.value >= count:
                return None
            self.head.value += 1
            return self.head.value - 1


def _process(index: int, count: int, target: Target, load: Load, shared: _Shared, result: Connection) -> None:
    try:
        result.send(asyncio.run(_Client(index, count, target, load, shared).run()))
    except Exception as error:  # the parent reports any error
        result.send(repr(error))


class _Client:
    """The clients of one process."""

    def __init__(self, index: int, count: int, target: Target, load: Load, shared: _Shared) -> None:
        self.index, self.count = index, count
        self.target, self.load, self.shared = target, load, shared
        self.finished: list[RequestTimes] = []
        self.refused: list[str] = []
        self.failed: dict[str, str] = {}
        mine = load.requests[index::count] if load.num_clients is None else load.requests
        self.bodies = {r.request_id: self._body(r) for r in (*mine, *load.warmup[index::count])}

    async def run(self) -> Outcome:
        import httpx

        headers = {"Authorization": f"Bearer {self.target.api_key}"} if self.target.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(TIMEOUT), limits=limits, headers={**headers, "Content-Type": "application/json"}
        ) as self.http:
            await asyncio.gather(*(self._send(r, measured=False) for r in self.load.warmup[self.index :: self.count]))
            await asyncio.to_thread(self.shared.barrier.wait)
            if self.index == 0:
                self.shared.begin.value = time.perf_counter()
            await asyncio.to_thread(self.shared.barrier.wait)
            cpu = time.process_time()
            begin = self.shared.begin.value
            if self.load.num_clients is None:
                work = [self._at(begin + r.arrival, r) for r in self.load.requests[self.index :: self.count]]
            else:
                work = [self._closed(begin + wait) for wait in self.load.stagger[self.index :: self.count]]
            await asyncio.gather(*work)
        return Outcome(
            begin=begin,
            finished=sorted(self.finished, key=lambda r: r.start),
            refused=self.refused,
            failed=self.failed,
            cpu_seconds=time.process_time() - cpu,
        )

    async def _closed(self, start: float) -> None:
        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        while (index := self.shared.next(len(self.load.requests))) is not None:
            await self._send(self.load.requests[index])

    async def _at(self, when: float, request: LoadRequest) -> None:
        await asyncio.sleep(max(0.0, when - time.perf_counter()))
        await self._send(request)

    async def _send(self, request: LoadRequest, *, measured: bool = True) -> None:
        body = self.bodies[request.request_id]
        chunks: list[tuple[float, bytes]] = []
        start = time.perf_counter()
        try:
            async with self.http.stream("POST", f"{self.target.url}/completions", content=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    if response.status_code in REFUSED:
                        self.refused.append(request.request_id)
                    else:
                        self.failed[request.request_id] = f"status {response.status_code}: {text[:300]}"
                    return
                async for data in response.aiter_raw():
                    chunks.append((time.perf_counter(), data))
            times, prompt_tokens, refused = read_stream(chunks)
        except Exception as error:  # counted rather than raised: the other clients continue
            self.failed[request.request_id] = repr(error)
            return
        if refused:
            self.refused.append(request.request_id)
        elif not times:
            self.failed[request.request_id] = "the response has no tokens"
        elif measured:
            self.finished.append(
                RequestTimes(
                    request_id=request.request_id,
                    num_prompt_tokens=prompt_tokens or request.num_prompt_tokens,
                    start=start,
                    token_times=tuple(times),
                )
            )

    def _body(self, request: LoadRequest) -> bytes:
        target = self.target
        ids = self.load.prompt_ids(request, vocab_size=target.vocab_size)
        return json.dumps(
            {
                "model": target.model,
                "prompt": " ".join(WORDS[i % len(WORDS)] for i in ids) if target.as_text else ids,
                "max_tokens": request.max_new_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **target.extra,
            }
        ).encode()


def read_stream(chunks: Sequence[tuple[float, bytes]]) -> tuple[list[float], int | None, bool]:
    """The arrival time of each token, the number of prompt tokens if reported, and whether the request was refused.

    A chunk with text counts as one token, or as many as it has `token_ids`. Tokens that only the final usage counts, because
    they were held back inside a character or a stop string, count as arriving with the last chunk. Raises ValueError for a
    stream that reports an error or ends without [DONE].
    """
    times: list[float] = []
    usage: JsonObject = {}
    refused = done = False
    rest = b""
    for at, data in chunks:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                done = True
                continue
            event = json.loads(payload)
            if "error" in event:
                raise ValueError(f"the server reported {event['error']}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                refused |= choice.get("finish_reason") == "refused"
                ids = choice.get("token_ids")
                times += [at] * (len(ids) if ids is not None else bool(choice.get("text")))
    if not done:
        raise ValueError("the stream ended before [DONE]")
    missing = usage.get("completion_tokens", 0) - len(times)
    if chunks and missing > 0 and not refused:
        times += [times[-1] if times else chunks[-1][0]] * missing
    return times, usage.get("prompt_tokens"), refused
