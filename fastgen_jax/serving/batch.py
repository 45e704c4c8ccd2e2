"""Runs a file of requests into a file of answers: each input line is answered exactly once, even after a kill.

Inputs are lines in OpenAI's batch format, `{"custom_id", "method", "url", "body"}`, JSON objects with "prompt" or
"messages", and JSON strings; or the file is plain text. The answer to line i has the id `batch-i`, so the output file is
the record of what is done. An invalid line gets an answer that is an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fastgen_jax.serving.batch_input import BatchInput, Line
from fastgen_jax.serving.batch_output import Answer, BatchOutput, Error, Response, is_error

BUSY = 429
AWAY = frozenset({408, 502, 503, 504})
MAX_WAIT = 30.0  # seconds: the longest pause between two tries
GIVE_UP_SECONDS = 90.0  # the server is gone after so long without any answer, unless it is loading
LINE_SECONDS = 270.0  # a line gets an error if it has no answer after so long while other lines do
FAILURES_KEPT = 3


@dataclass
class BatchResult:
    """What a run of a batch did."""

    total: int
    """Input lines that are not blank."""
    resumed: int = 0
    """Lines that an earlier run had answered."""
    answered: int = 0
    """Lines answered by this run, errors included."""
    failed: int = 0
    """Lines that this run answered with an error."""
    failures: list[str] = field(default_factory=list)
    """Messages of the first few errors."""

    def note(self, answer: Answer) -> None:
        """Counts an answer."""
        self.answered += 1
        if is_error(answer):
            self.failed += 1
            if len(self.failures) < FAILURES_KEPT:
                self.failures.append(f"{answer['id']} ({answer['custom_id']!r}): {_reason(answer)}")


class Batch:
    """An input and its output, opened and checked; ValueError if either cannot be used. A context manager.

    `form` says what the input contains: "jsonl", "text", or "auto", which decides by the file's name and first line.
    """

    def __init__(self, source: Path, target: Path, *, form: str = "auto") -> None:
        self.input = BatchInput(source, form=form)
        self.output = BatchOutput(target, self.input)
        self.result = BatchResult(total=self.input.num_lines, resumed=self.output.done.count)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()

    async def run(
        self,
        http: httpx.AsyncClient,
        *,
        model: str,
        options: Mapping[str, object] | None = None,
        concurrency: int = 256,
        on_progress: Callable[[BatchResult], object] = lambda result: None,
    ) -> BatchResult:
        """Answers the remaining lines, `concurrency` at a time, in any order.

        Memory holds `concurrency` requests and a few bytes per line. Raises ValueError if the output cannot be written,
        and ConnectionError if the server is gone; the answers so far are kept.
        """
        waiting = self._requests(model, options or {})
        server = _Server(http)

        async def work() -> None:
            for line, request in waiting:
                answer = await server.ask(line, *request) if isinstance(request, tuple) else request
                self.output.write(answer)
                self.result.note(answer)
                on_progress(self.result)
                await asyncio.sleep(0)  # many invalid lines in a row need no request

        on_progress(self.result)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self.output.flush()
        return self.result

    def _requests(self, model: str, options: Mapping[str, object]) -> Iterator[tuple[Line, tuple[str, bytes] | Answer]]:
        """Each remaining line with its URL and body, or with its error if it is invalid."""
        for line in self.input:
            if line.number in self.output.done:
                continue
            try:
                if (first := self.input.repeats.get(line.number)) is not None:
                    raise ValueError(f"custom_id {line.custom_id!r} is already used by batch-{first}; make each unique")
                url, body = line.request(model, options)
                yield line, (url, json.dumps(body, allow_nan=False).encode())
            except (ValueError, RecursionError) as error:
                yield line, _answer(line, error={"code": "invalid_line", "message": str(error)})


async def run_batch(http: httpx.AsyncClient, source: Path, target: Path, *, form: str = "auto", **rest: Any) -> BatchResult:
    """Opens a `Batch` and runs it; `rest` are the arguments of `Batch.run`."""
    with Batch(source, target, form=form) as batch:
        return await batch.run(http, **rest)


class _Server:
    """Sends requests, and sends them again while the server is busy, loading or briefly away."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._clock = asyncio.get_running_loop().time
        self._last_answer = self._clock()

    async def ask(self, line: Line, url: str, body: bytes) -> Answer:
        """Returns the answer to a line; ConnectionError if no line has been answered for GIVE_UP_SECONDS."""
        pause, away_since = 0.1, None
        while True:
            wait, trouble, answer = 0.0, "away", None
            try:
                response = await self._http.post(url, content=body, headers={"content-type": "application/json"})
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                answer = _answer(line, error={"code": "no_answer", "message": reason})
            else:
                trouble, found = _trouble(response), _json(response)
                answer = _answer(
                    line,
                    response={
                        "status_code": response.status_code,
                        "body": found,
                        "request_id": response.headers.get("x-request-id"),
                    },
                )
                reason = f"it answers {response.status_code}: {_message(found)}"
                wait = _seconds(response.headers.get("retry-after"))
            now = self._clock()
            if trouble != "away":
                self._last_answer, away_since = now, None
            if trouble is None:
                return answer
            if trouble == "away":
                away_since = now if away_since is None else away_since
                if min(now - away_since, now - self._last_answer) >= GIVE_UP_SECONDS:
                    raise ConnectionError(f"no answer from the server for {GIVE_UP_SECONDS:g} s ({reason})")
                if now - away_since >= LINE_SECONDS:
                    return answer
            pause = min(max(2 * pause, wait), MAX_WAIT)
            await asyncio.sleep(pause)


def _trouble(response: httpx.Response) -> str | None:
    """Why to try again: "busy" or "loading", which pass, or "away", which may not; None if this is the answer."""
    if response.headers.get("x-should-retry") == "false":
        return None
    if response.status_code == BUSY:
        return "busy"
    if response.status_code not in AWAY:
        return None
    body = _json(response)
    error = body.get("error") if isinstance(body, dict) else None
    return "loading" if isinstance(error, dict) and error.get("code") == "loading" else "away"


def _answer(line: Line, *, response: Response | None = None, error: Error | None = None) -> Answer:
    return {"id": f"batch-{line.number}", "custom_id": line.custom_id, "response": response, "error": error}


def _json(response: httpx.Response) -> object:
    """The JSON body, or the text of a body that is not JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return response.text


def _seconds(text: str | None) -> float:
    """The value of a Retry-After header; 0 if it is absent or a date."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _message(body: object) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error["message"]) if isinstance(error, dict) and "message" in error else str(body)[:200]


def _reason(answer: Answer) -> str:
    if answer["error"] is not None:
        return answer["error"]["message"]
    assert answer["response"] is not None  # an answer has one of the two
    return f"HTTP {answer['response']['status_code']}: {_message(answer['response']['body'])}"
