"""How a measured engine talks to the benchmark: one JSON object a line, commands in, results out.

This file is imported both by the benchmark and, by its path, by workers that run under another Python with
another engine's dependencies: standard library only, nothing newer than Python 3.10.

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
from typing import Any

Requests = list[dict[str, Any]]


class Timeline:
    """Collects what a run produced: for each request when it started and when how many tokens arrived."""

    def __init__(self, requests: Requests, start: float = 0.0) -> None:
        self._by_id: dict[str, dict[str, Any]] = {
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
        """Notes that `token_ids` (maybe none) of a request arrived `at` seconds after the run began."""
        if token_ids:
            record = self._by_id[request_id]
            record["events"].append([at, len(token_ids)])
            record["token_ids"].extend(token_ids)

    def result(self) -> dict[str, Any]:
        """The run in the form that `serve` sends."""
        return {"requests": list(self._by_id.values())}


def serve(
    load: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[Requests], dict[str, Any]]]],
) -> None:
    """Runs a worker: `load(options)` -> (description, run); then `run(requests)` for every command line.

    `options` is the JSON object in the first argument. Whatever the engine prints goes to standard error.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    description, run = load(options)
    print(json.dumps(description), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["requests"])), file=channel, flush=True)
