"""How a measured engine talks to the benchmark: one JSON object per line, commands in, results out.

Both the benchmark and the workers import this file. Workers import it by path, under another Python with another engine's
dependencies, so it uses the standard library only and nothing newer than Python 3.10.

    in   {"requests": [{"request_id": str, "prompt_token_ids": [int], "max_new_tokens": int}, ...]}
    out  {"requests": [{"request_id": str, "start": s, "events": [[s, new tokens], ...], "token_ids": [int]}, ...]}

Times are seconds since the run began. The first line out is the engine's description, sent once it is loaded.
End of input ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypedDict

JsonObject = dict[str, Any]
"""A JSON object; its values are what the engine in question has to say."""


class Request(TypedDict):
    """One request of a command; exactly `max_new_tokens` tokens are generated."""

    request_id: str
    prompt_token_ids: list[int]
    max_new_tokens: int


Run = Callable[[list[Request]], JsonObject]
"""Runs the requests and returns `Timeline.result()`, with any further figures of the engine."""


class Timeline:
    """Records a run: when each request started, and when how many of its tokens arrived."""

    def __init__(self, requests: list[Request], start: float = 0.0) -> None:
        self._by_id: dict[str, JsonObject] = {
            request["request_id"]: {
                "request_id": request["request_id"],
                "prompt_tokens": len(request["prompt_token_ids"]),
                "start": start,
                "events": [],
                "token_ids": [],
            }
            for request in requests
        }

    def add(self, request_id: str, at: float, token_ids: list[int]) -> None:
        """Records that `token_ids` (possibly none) of a request arrived `at` seconds after the run began."""
        if token_ids:
            record = self._by_id[request_id]
            record["events"].append([at, len(token_ids)])
            record["token_ids"].extend(token_ids)

    def update(self, request_id: str, at: float, all_token_ids: list[int]) -> None:
        """Like `add`, for an engine that reports all tokens of a request so far."""
        self.add(request_id, at, all_token_ids[len(self._by_id[request_id]["token_ids"]) :])

    def result(self) -> JsonObject:
        """The run in the form that `serve` sends."""
        return {"requests": list(self._by_id.values())}


def serve(load: Callable[[JsonObject], tuple[JsonObject, Run]]) -> None:
    """Runs a worker: calls `load(options)` -> (description, run), then `run(requests)` for every command line.

    `options` is the JSON object in the first argument. Whatever the engine prints goes to standard error.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    description, run = load(options)
    print(json.dumps(description), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["requests"])), file=channel, flush=True)
