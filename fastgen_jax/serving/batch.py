"""A file of requests to a file of answers: each input line answered exactly once, also after a kill in the middle.

Inputs are lines in OpenAI's batch format, `{"custom_id", "method", "url", "body"}`, JSON objects with "prompt" or
"messages", and JSON strings; or the file is plain text. The answer to line i carries the id `batch-i`: the output file is
its own record of what is done. A line that is not sound costs one answer that is an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fastgen_jax.serving.batch_input import BatchInput, Line
from fastgen_jax.serving.batch_output import BatchOutput, is_error

BUSY = 429
AWAY = frozenset({408, 502, 503, 504})
MAX_WAIT = 30.0  # seconds between two tries at most
GIVE_UP_SECONDS = 90.0  # without a sign of a server that is not loading
LINE_SECONDS = 270.0  # for a line that gets no answer while others do
FAILURES_KEPT = 3


@dataclass
class BatchResult:
    """What a run of a batch did."""

    total: int
    """Lines of the input that are not blank."""
    resumed: int = 0
    """Lines that had been answered before."""
    answered: int = 0
    """Lines answered now, also by an error."""
    failed: int = 0
    """Of these, lines whose answer is an error."""
    failures: list[str] = field(default_factory=list)
    """The first of these, in words."""

    def note(self, answer: dict[str, Any]) -> None:
        """Counts an answer."""
        self.answered += 1
        if is_error(answer):
            self.failed += 1
            if len(self.failures) < FAILURES_KEPT:
                self.failures.append(f"{answer['id']} ({answer['custom_id']!r}): {_reason(answer)}")


class Batch:
    """An input and its output, opened and looked through; ValueError if either cannot be one. A context manager.

    `form` says what the input holds: "jsonl", "text", or "auto", which goes by its name and its first line.
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
        options: dict[str, Any] | None = None,
        concurrency: int = 256,
        on_progress: Callable[[BatchResult], object] = lambda result: None,
    ) -> BatchResult:
        """Answers the lines that have no answer yet, `concurrency` at a time, in any order.

        Memory holds `concurrency` requests and some bytes for each line. Raises ValueError if the output cannot be
        written, and ConnectionError if the server is gone for good; what was answered until then is kept.
        """
        waiting = self._requests(model, options or {})
        server = _Server(http)

        async def work() -> None:
            for line, request in waiting:
                answer = request if isinstance(request, dict) else await server.ask(line, *request)
                self.output.write(answer)
                self.result.note(answer)
                on_progress(self.result)
                await asyncio.sleep(0)  # many lines that ask for nothing may follow one another

        on_progress(self.result)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self.output.flush()
        return self.result

    def _requests(self, model: str, options: dict[str, Any]) -> Iterator[tuple[Line, tuple[str, bytes] | dict[str, Any]]]:
        """Each line that is not done with its URL and body, or with the answer that it has by itself."""
        for line in self.input:
            if line.number in self.output.done:
                continue
            try:
                if (first := self.input.repeats.get(line.number)) is not None:
                    raise ValueError(f"custom_id {line.custom_id!r} is that of batch-{first} already; give each its own")
                url, body = line.request(model, options)
                yield line, (url, json.dumps(body, allow_nan=False).encode())
            except (ValueError, RecursionError) as error:
                yield line, _answer(line, error={"code": "invalid_line", "message": str(error)})


async def run_batch(http: httpx.AsyncClient, source: Path, target: Path, *, form: str = "auto", **rest: Any) -> BatchResult:
    """Opens a `Batch` and runs it; `rest` are the arguments of `Batch.run`."""
    with Batch(source, target, form=form) as batch:
        return await batch.run(http, **rest)


class _Server:
    """Who answers; asked again while it is busy, loads, or is away for a moment."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._clock = asyncio.get_running_loop().time
        self._heard = self._clock()

    async def ask(self, line: Line, url: str, body: bytes) -> dict[str, Any]:
        """The answer to a line; ConnectionError if nobody has answered any for GIVE_UP_SECONDS."""
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
                self._heard, away_since = now, None
            if trouble is None:
                return answer
            if trouble == "away":
                away_since = now if away_since is None else away_since
                if min(now - away_since, now - self._heard) >= GIVE_UP_SECONDS:
                    raise ConnectionError(f"no answer from the server for {GIVE_UP_SECONDS:g} s ({reason})")
                if now - away_since >= LINE_SECONDS:
                    return answer
            pause = min(max(2 * pause, wait), MAX_WAIT)
            await asyncio.sleep(pause)


def _trouble(response: httpx.Response) -> str | None:
    """What is in the way of an answer: "busy" and "loading" pass, "away" may not; None if this is the answer."""
    if response.headers.get("x-should-retry") == "false":
        return None
    if response.status_code == BUSY:
        return "busy"
    if response.status_code not in AWAY:
        return None
    body = _json(response)
    error = body.get("error") if isinstance(body, dict) else None
    return "loading" if isinstance(error, dict) and error.get("code") == "loading" else "away"


def _answer(line: Line, *, response: dict[str, Any] | None = None, error: dict[str, str] | None = None) -> dict[str, Any]:
    return {"id": f"batch-{line.number}", "custom_id": line.custom_id, "response": response, "error": error}


def _json(response: httpx.Response) -> Any:
    """The body; its text where it is not JSON, as from a server of another kind."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return response.text


def _seconds(text: str | None) -> float:
    """A Retry-After; 0 if there is none, or a date."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _message(body: Any) -> str:
    try:
        return str(body["error"]["message"])
    except (KeyError, TypeError):
        return str(body)[:200]


def _reason(answer: dict[str, Any]) -> str:
    if answer["error"] is not None:
        return answer["error"]["message"]
    return f"HTTP {answer['response']['status_code']}: {_message(answer['response']['body'])}"
