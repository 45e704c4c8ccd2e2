"""Chats that their client asked to store: the endpoints that list, return, label and delete them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Query, Request
from pydantic import Field

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.errors import ApiError, ErrorResponses
from fastgen_jax.serving.fields import Body
from fastgen_jax.serving.kept import Kept, Order, page_of
from fastgen_jax.text.messages import text_of

PATH = "/v1/chat/completions"
_KEY = re.compile(r"metadata\[([^\]]{1,64})\]")


class MetadataRequest(Body):
    """POST /v1/chat/completions/{id}: the labels that replace those of a stored chat."""

    metadata: Annotated[JsonObject, Field(max_length=16)] | None


@dataclass
class StoredChat:
    """An answer, and the messages that it answers."""

    completion: JsonObject
    messages: list[JsonObject]


class ChatStore:
    """The stored chats of each client; clients are told apart by their API key, if the server requires one."""

    def __init__(self) -> None:
        self._kept: Kept[tuple[str, StoredChat]] = Kept()

    def add(self, owner: str, completion: JsonFields, messages: Sequence[JsonFields], metadata: JsonFields | None) -> None:
        """Stores the answer to `messages`."""
        stored = StoredChat({**completion, "metadata": metadata or {}}, [*map(dict, messages)])
        self._put(owner, stored)

    def get(self, owner: str, completion_id: str) -> StoredChat:
        """A stored chat; ApiError 404 if there is none."""
        found = self._kept.get(_key(owner, completion_id))
        if found is None:
            raise ApiError(
                f"there is no stored chat {completion_id[:100]!r}: it was not stored (store=true), deleted, or dropped "
                "for newer ones",
                status=404,
                param="completion_id",
                code="chat_not_found",
            )
        return found[1]

    def label(self, owner: str, completion_id: str, metadata: JsonFields | None) -> JsonObject:
        """Replaces the labels of a chat; returns it."""
        stored = self.get(owner, completion_id)
        stored.completion["metadata"] = metadata or {}
        self._put(owner, stored)
        return stored.completion

    def remove(self, owner: str, completion_id: str) -> None:
        """Forgets a chat; ApiError 404 if there is none."""
        self.get(owner, completion_id)
        self._kept.remove(_key(owner, completion_id))

    def completions(self, owner: str, model: str | None, metadata: JsonFields) -> list[JsonObject]:
        """The answers of a model, with these labels, in the order in which they were stored."""
        mine = [stored.completion for name, stored in self._kept.values() if name == owner]
        return [
            completion
            for completion in mine
            if model in (None, completion["model"])
            and all(completion["metadata"].get(name) == value for name, value in metadata.items())
        ]

    def _put(self, owner: str, stored: StoredChat) -> None:
        size = len(json.dumps((stored.completion, stored.messages), ensure_ascii=False))
        self._kept.add(_key(owner, stored.completion["id"]), (owner, stored), size)


def add_stored_chats(app: FastAPI, store: ChatStore, errors: ErrorResponses) -> None:
    """Adds the endpoints."""
    limits = Query(20, ge=0, le=100)

    @app.get(PATH, responses=errors)
    async def list_chats(
        request: Request, model: str | None = None, after: str | None = None, limit: int = limits, order: Order = "asc"
    ) -> JsonObject:
        given = request.query_params.multi_items()
        metadata = {found[1]: value for name, value in given if (found := _KEY.fullmatch(name))}
        return page_of(store.completions(owner_of(request), model, metadata), after=after, limit=limit, order=order)

    @app.get(PATH + "/{completion_id}", responses=errors)
    async def retrieve(completion_id: str, request: Request) -> JsonObject:
        return store.get(owner_of(request), completion_id).completion

    @app.post(PATH + "/{completion_id}", responses=errors)
    async def update(completion_id: str, body: MetadataRequest, request: Request) -> JsonObject:
        return store.label(owner_of(request), completion_id, body.metadata)

    @app.delete(PATH + "/{completion_id}", responses=errors)
    async def delete(completion_id: str, request: Request) -> JsonObject:
        store.remove(owner_of(request), completion_id)
        return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}

    @app.get(PATH + "/{completion_id}/messages", responses=errors)
    async def list_messages(
        completion_id: str, request: Request, after: str | None = None, limit: int = limits, order: Order = "asc"
    ) -> JsonObject:
        messages = store.get(owner_of(request), completion_id).messages
        items = [_with_id(message, f"{completion_id}-{i}") for i, message in enumerate(messages)]
        return page_of(items, after=after, limit=limit, order=order)


def owner_of(request: Request) -> str:
    """The API key of a request; "" if the server requires none."""
    return getattr(request.state, "key", "")


def _key(owner: str, completion_id: str) -> str:
    return f"{owner}\n{completion_id}"


def _with_id(message: JsonFields, message_id: str) -> JsonObject:
    """A message in the form in which it is listed: its content as text and, if it was given in parts, the parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    texts = None if parts is None else text_of([part for part in parts if isinstance(part, dict) and "text" in part])
    return {**message, "id": message_id, "content": content if parts is None else texts, "content_parts": parts}
