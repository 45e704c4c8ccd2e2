"""A file of requests to a file of answers: each input line answered exactly once, also after a kill in the middle.

Inputs are lines in OpenAI's batch format, `{"custom_id", "method", "url", "body"}`, JSON objects with "prompt" or
"messages", JSON strings, or plain text. The answer to line i carries the id `batch-i`: the output file is its own
record of what is done, and nothing else is kept. An answer is one write of one line; a line cut off by a kill is
removed when the batch goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx

URLS = ("/v1/completions", "/v1/chat/completions")
RETRIED = frozenset({408, 429, 503})
MAX_WAIT = 30.0  # seconds between two tries at most
FLUSH_EVERY = 64  # answers between two flushes to the disk


class Done:
    """Which input lines have an answer: a bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, line: int) -> None:
        """Notes an answer."""
        if line in self:
            return
        index = line >> 3
        if index >= len(self._bits):
            self._bits.extend(bytes(index + 1 - len(self._bits)))
        self._bits[index] |= 1 << (line & 7)
        self.count += 1

    def __contains__(self, line: int) -> bool:
        index = line >> 3
        return index < len(self._bits) and bool(self._bits[index] >> (line & 7) & 1)


@dataclass
class BatchResult:
    """What a run of a batch did."""

    answered: int = 0
    failed: int = 0
    """Of these, lines whose answer is an error."""
    resumed: int = 0
    """Lines that had an answer before."""
    notes: list[str] = field(default_factory=list)


def read_done(path: Path) -> Done:
    """The lines that the output file answers; cuts off an answer that was not written whole."""
    done = Done()
    if not path.exists():
        return done
    with path.open("r+b") as file:
        end = 0
        for line in file:
            try:
                number = int(json.loads(line)["id"].removeprefix("batch-")) if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError, AttributeError):
                number = None
            if number is None:
                if file.read(1):
                    raise ValueError(f"{path} is not the output of a batch: line {done.count + 1} is no answer; choose "
                                     "another output file")
                break  # the last line, cut off
            done.add(number)
            end += len(line)
        file.truncate(end)
    return done


def read_request(line: str, model: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """URL and body of an input line; `options` go into bodies that do not have them."""
    try:
        value = json.loads(line)
    except ValueError:
        value = line
    if isinstance(value, dict) and "body" in value:
        url, body = value.get("url"), value["body"]
        if url not in URLS:
            raise ValueError(f"url is {url!r}; choose one of {', '.join(URLS)}")
        if value.get("method", "POST") != "POST":
            raise ValueError(f"method is {value['method']!r}; it must be POST")
        if not isinstance(body, dict) or body.get("stream"):
            raise ValueError("body must be an object without stream=true")
        return url, {**options, **body}
    if isinstance(value, dict) and ("prompt" in value or "messages" in value):
        url = URLS["messages" in value]
        rest = {name: item for name, item in value.items() if name != "custom_id"}
        return url, {"model": model, **options, **rest}
    if isinstance(value, dict):
        raise ValueError("an object needs 'body' (OpenAI's batch format), 'prompt' or 'messages'")
    text = value if isinstance(value, str) else line
    return URLS[0], {"model": model, "prompt": text, **options}


async def run_batch(
    http: httpx.AsyncClient,
    source: Path,
    target: Path,
    *,
    model: str,
    options: dict[str, Any] | None = None,
    concurrency: int = 256,
    on_progress: Callable[[BatchResult], object] = lambda result: None,
) -> BatchResult:
    """Answers the lines of `source` that `target` does not answer yet, `concurrency` at a time, in any order.

    Memory holds `concurrency` requests and a bit for each line. Raises ValueError if `target` is not a batch's output,
    and httpx.HTTPError if the server is gone for good.
    """
    done = read_done(target)
    result = BatchResult(resumed=done.count)
    on_progress(result)
    with source.open("rb") as lines, target.open("ab", buffering=0) as answers:
        waiting = _unanswered(lines, done)

        async def work() -> None:
            for number, line in waiting:
                answer = await _answer(http, number, line, model, options or {})
                _write(answers, answer)
                result.answered += 1
                result.failed += answer["error"] is not None or answer["response"]["status_code"] != 200
                if result.answered % FLUSH_EVERY == 0:
                    os.fsync(answers.fileno())
                on_progress(result)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        os.fsync(answers.fileno())
    return result


def count_lines(path: Path) -> int:
    """Lines that are not empty, for the progress bar."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _unanswered(lines: BinaryIO, done: Done) -> Iterator[tuple[int, str]]:
    for number in itertools.count():
        line = lines.readline()
        if not line:
            return
        if number not in done and line.strip():
            yield number, line.decode("utf-8", "replace").strip("\r\n")


async def _answer(
    http: httpx.AsyncClient, number: int, line: str, model: str, options: dict[str, Any]
) -> dict[str, Any]:
    custom_id = _custom_id(line, number)
    try:
        url, body = read_request(line, model, options)
    except ValueError as error:
        return {"id": f"batch-{number}", "custom_id": custom_id, "response": None,
                "error": {"code": "invalid_line", "message": str(error)}}
    pause = 0.2
    while True:
        try:
            response = await http.post(url, json=body)
        except httpx.TransportError:
            if pause >= MAX_WAIT:
                raise
        else:
            if response.status_code not in RETRIED or response.headers.get("x-should-retry") == "false":
                return {"id": f"batch-{number}", "custom_id": custom_id, "error": None, "response": {
                    "status_code": response.status_code, "request_id": response.headers.get("x-request-id"),
                    "body": response.json()}}
            pause = max(pause, min(float(response.headers.get("retry-after", 0)), MAX_WAIT) / 2)
        pause = min(2 * pause, MAX_WAIT)
        await asyncio.sleep(pause)


def _custom_id(line: str, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    return str(value.get("custom_id", number) if isinstance(value, dict) else number)


def _write(file: BinaryIO, answer: dict[str, Any]) -> None:
    """One write, so that a kill leaves a whole line or a piece without its end, never two mixed."""
    data = memoryview(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
    while data:
        data = data[file.write(data) :]
