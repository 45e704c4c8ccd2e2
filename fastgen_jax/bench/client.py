"""Clients of an OpenAI-compatible server: a load over HTTP with streaming, from one process or several.

A chunk is time-stamped when it comes off the network and parsed only when its request is complete, so that a client
costs little while others wait for their next token.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen_jax.bench.loads import Load, LoadRequest
from fastgen_jax.bench.metrics import RequestTimes

TIMEOUT = 1800.0  # seconds of silence after which a request has failed
REFUSED = (429, 503)  # status of a server that is too busy


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and how they are written."""

    url: str
    """Up to and including /v1."""
    model: str
    api_key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request, like ignore_eos."""
    as_text: bool = False
    """Prompts as words instead of token ids, for servers that take no ids; lengths are then as the server counts them."""
    vocab_size: int = 32_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a load: times by `time.perf_counter`, which all processes of a machine share."""

    begin: float
    finished: list[RequestTimes]
    refused: list[str]
    failed: dict[str, str]
    """Request id -> what went wrong."""
    cpu_seconds: float
    """Processor time that the clients took."""


def run_load(target: Target, load: Load, *, num_processes: int = 1) -> Outcome:
    """Sends `load` to a server from `num_processes` processes; raises RuntimeError if one of them dies.

    Clients, or the arrivals of an open loop, are dealt out to the processes in turns; the queue of a closed loop is common
    to all. Raises ValueError without httpx, and for more processes than clients.
    """
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise ValueError("the client needs httpx; pip install 'fastgen_jax[bench]'") from error
    most = load.num_clients or len(load.requests)
    if not 1 <= num_processes <= most:
        raise ValueError(f"num_processes is {num_processes}; use 1 to {most}, the clients that there are")
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Value("d", 0.0), context.Barrier(num_processes))
    if num_processes == 1:
        return asyncio.run(_Client(0, 1, target, load, shared).run())
    results = context.Queue()
    processes = [
        context.Process(target=_process, args=(i, num_processes, target, load, shared, results), daemon=True)
        for i in range(num_processes)
    ]
    for process in processes:
        process.start()
    outcomes: list[Outcome | str] = []
    try:
        while len(outcomes) < num_processes:
            if results.empty() and any(process.exitcode for process in processes):
                raise RuntimeError("a client process has died; see its message above")
            if results.empty():
                time.sleep(0.02)
                continue
            outcomes.append(results.get())
    finally:
        for process in processes:
            process.terminate()
            process.join()
    failure = next((o for o in outcomes if isinstance(o, str)), None)
    if failure:
        raise RuntimeError(f"a client process failed: {failure}")
    parts = [o for o in outcomes if isinstance(o, Outcome)]
    return Outcome(
        begin=shared.begin.value,
        finished=sorted((r for part in parts for r in part.finished), key=lambda r: r.start),
        refused=[name for part in parts for name in part.refused],
        failed={name: why for part in parts for name, why in part.failed.items()},
        cpu_seconds=sum(part.cpu_seconds for part in parts),
    )


@dataclass(frozen=True)
class _Shared:
    """What the processes have in common: the head of the queue, the moment of the start, and a barrier."""

    head: Any
    begin: Any
    barrier: Any

    def next(self, count: int) -> int | None:
        """The index of the next request of the common queue; None when all are taken."""
        with self.head.get_lock():
            if self.head.value >= count:
                return None
            self.head.value += 1
            return self.head.value - 1


def _process(index: int, count: int, target: Target, load: Load, shared: _Shared, results: Any) -> None:
    try:
        results.put(asyncio.run(_Client(index, count, target, load, shared).run()))
    except Exception as error:  # whatever it is, the parent must hear of it
        results.put(repr(error))


class _Client:
    """One process' share of the clients."""

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
        except Exception as error:  # counted, not raised: the other clients go on
            self.failed[request.request_id] = repr(error)
            return
        if refused:
            self.refused.append(request.request_id)
        elif not times:
            self.failed[request.request_id] = "the answer has no tokens"
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


WORDS = [  # each a token in most vocabularies
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
]


def read_stream(chunks: Sequence[tuple[float, bytes]]) -> tuple[list[float], int | None, bool]:
    """When each token came, the prompt tokens if the server tells, and whether the server refused the request.

    A chunk that carries text is a token, or as many as its `token_ids`; tokens that only the final usage knows of
    (held back inside a character or a stop string) came with the last chunk. Raises ValueError for a stream that
    reports an error or ends without [DONE].
    """
    times: list[float] = []
    usage: dict[str, Any] = {}
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
                raise ValueError(f"the server reports {event['error']}")
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
