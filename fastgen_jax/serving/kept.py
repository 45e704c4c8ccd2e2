"""Objects kept in the memory of this process, and pages of lists of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.errors import ApiError

T = TypeVar("T")

MAX_OBJECTS = 4096
MAX_BYTES = 64 * 2**20  # of their JSON
Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class _Entry(Generic[T]):
    value: T
    size: int
    number: int


class Kept(Generic[T]):
    """The objects used last, by key; those not used for longest are dropped if all are too many, or too large together."""

    def __init__(self, *, max_objects: int = MAX_OBJECTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_objects = max_objects
        self._max_bytes = max_bytes
        self._size = 0
        self._added = 0
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: str, value: T, size: int) -> None:
        """Keeps an object of `size` bytes, in place of an earlier one with this key; not if it is too large on its own."""
        before = self._entries.get(key)
        self.remove(key)
        if size > self._max_bytes:
            return
        self._added += 1
        self._entries[key] = _Entry(value, size, before.number if before else self._added)
        self._size += size
        while len(self._entries) > self._max_objects or self._size > self._max_bytes:
            self._size -= self._entries.popitem(last=False)[1].size

    def get(self, key: str) -> T | None:
        """The object, which counts as used; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def remove(self, key: str) -> None:
        """Forgets an object, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size -= entry.size

    def values(self) -> list[T]:
        """All objects, in the order in which they were added."""
        return [entry.value for entry in sorted(self._entries.values(), key=lambda entry: entry.number)]


def page_of(items: Sequence[JsonFields], *, after: str | None, limit: int, order: Order) -> JsonObject:
    """At most `limit` of the items, which have ids, in OpenAI's form of a list; ApiError if none has the id `after`.

    `items` are in ascending order.
    """
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ApiError(f"after is {after[:100]!r}, which is not in this list; use last_id of the page before", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page = list(items[start : start + limit])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }
