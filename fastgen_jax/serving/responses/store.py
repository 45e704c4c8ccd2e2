"""Responses kept in memory, for `previous_response_id` and for clients that ask for them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.kept import MAX_BYTES, MAX_OBJECTS, Kept
from fastgen_jax.serving.responses.background import BackgroundResponse

MAX_BACKGROUND_TOKENS = (
    256 * 1024
)  # of all responses that are being generated in the background; an event has about 250 bytes


@dataclass(frozen=True)
class Stored:
    """A response, and the items of its request."""

    response: JsonObject
    items: list[JsonObject]
    events: Sequence[bytes] = ()
    """Those of its stream, if it was generated in the background."""


class ResponseStore:
    """Keeps the latest responses that have ended, and those that are being generated in the background."""

    def __init__(self, *, max_responses: int = MAX_OBJECTS, max_bytes: int = MAX_BYTES) -> None:
        self._kept: Kept[Stored] = Kept(max_objects=max_responses, max_bytes=max_bytes)
        self._running: dict[str, tuple[BackgroundResponse, list[JsonObject]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, response: JsonObject, items: list[JsonObject], events: Sequence[bytes] = ()) -> None:
        """Stores a response with the items of its request."""
        size = len(json.dumps((response, items), ensure_ascii=False)) + sum(map(len, events))
        self._kept.add(response["id"], Stored(response, items, events), size)

    def start(self, running: BackgroundResponse, items: list[JsonObject], on_end: Callable[[], None]) -> None:
        """Starts to generate a response, and stores what has become of it when it has ended."""
        response_id: str = running.response["id"]
        self._running[response_id] = running, items

        def ended() -> None:
            on_end()
            if self._running.pop(response_id, None) is not None:  # otherwise it was deleted
                self.add(running.response, items, running.log)

        running.start(ended)

    def check_room(self, num_tokens: int) -> None:
        """ApiError 429 if a response of that many tokens is too much beside those that run in the background."""
        others = sum(running.max_tokens for running, _ in self._running.values())
        if others and others + num_tokens > MAX_BACKGROUND_TOKENS:
            raise ApiError(
                f"this response may have {num_tokens} tokens, and those that are generated in the background {others}, "
                f"but all together at most {MAX_BACKGROUND_TOKENS}; retry later, or set background=false or a smaller "
                "max_output_tokens",
                status=429,
                type="rate_limit_error",
                param="background",
                code="background_full",
                headers={"Retry-After": "10"},
            )

    def running(self, response_id: str) -> BackgroundResponse | None:
        """The response with this id if it is being generated in the background."""
        return self._running[response_id][0] if response_id in self._running else None

    def input_of(self, response_id: str) -> list[JsonObject]:
        """The items of the request for a response; ApiError 404 if there is none."""
        return self._running[response_id][1] if response_id in self._running else self.get(response_id).items

    def get(self, response_id: str, *, param: str = "response_id") -> Stored:
        """A response that has ended; ApiError 404 if there is none, and 400 if it is still being generated."""
        if response_id in self._running:
            raise ApiError(
                f"the response {response_id!r} is still being generated; wait until its status is completed",
                param=param,
                code="response_in_progress",
            )
        if (stored := self._kept.get(response_id)) is None:
            raise ApiError(
                f"there is no response {response_id!r}: it was not stored, was deleted, or was dropped for newer ones; "
                "send the whole conversation as input",
                status=404,
                param=param,
                code="response_not_found",
            )
        return stored

    def remove(self, response_id: str) -> None:
        """Forgets a response, and ends it if it is still being generated; ApiError 404 if there is none."""
        if response_id in self._running:
            self._running.pop(response_id)[0].close()
            return
        self.get(response_id)
        self._kept.remove(response_id)

    def conversation(self, response_id: str | None) -> list[JsonObject]:
        """The items of a response, and of those before it: what was said, in order."""
        parts: list[list[JsonObject]] = []
        while response_id is not None:
            stored = self.get(response_id, param="previous_response_id")
            parts.append([*stored.items, *stored.response["output"]])
            response_id = stored.response["previous_response_id"]
        return [item for part in reversed(parts) for item in part]
