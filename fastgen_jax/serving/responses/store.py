"""Responses kept in memory, for `previous_response_id` and for clients that ask for them again."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.errors import ApiError

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20  # of their JSON


@dataclass(frozen=True)
class Stored:
    """A response, and the items of its request."""

    response: JsonObject
    items: list[JsonObject]
    size: int


class ResponseStore:
    """Keeps the latest responses; the oldest ones are dropped when there are too many, or they are too large together."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._size = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, response: JsonObject, items: list[JsonObject]) -> None:
        """Stores a response with the items of its request."""
        size = len(json.dumps((response, items), ensure_ascii=False))
        self._stored[response["id"]] = Stored(response, items, size)
        self._size += size
        while len(self._stored) > self._max_responses or self._size > self._max_bytes:
            self._size -= self._stored.popitem(last=False)[1].size

    def get(self, response_id: str, *, param: str = "response_id") -> Stored:
        """A stored response; ApiError 404 if there is none."""
        if response_id not in self._stored:
            raise ApiError(
                f"there is no response {response_id!r}: it was not stored, was deleted, or was dropped for newer ones; "
                "send the whole conversation as input",
                status=404,
                param=param,
                code="response_not_found",
            )
        self._stored.move_to_end(response_id)
        return self._stored[response_id]

    def remove(self, response_id: str) -> None:
        """Forgets a response; ApiError 404 if there is none."""
        self._size -= self.get(response_id).size
        del self._stored[response_id]

    def conversation(self, response_id: str | None) -> list[JsonObject]:
        """The items of a response, and of those before it: what was said, in order."""
        parts: list[list[JsonObject]] = []
        while response_id is not None:
            stored = self.get(response_id, param="previous_response_id")
            parts.append([*stored.items, *stored.response["output"]])
            response_id = stored.response["previous_response_id"]
        return [item for part in reversed(parts) for item in part]
