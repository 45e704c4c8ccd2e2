"""Streamed responses, and stopping work when the client disconnects.

Unlike sse-starlette's `EventSourceResponse`, the status is sent with the first event, so a request that fails before it gets
an error status; there are no pings, and a stream runs two tasks instead of a task group with a lock around every send.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.answers import DONE, SseEncoder
from fastgen_jax.serving.errors import as_api_error

T = TypeVar("T")


def typed_event(kind: str, fields: JsonFields) -> bytes:
    """An event whose type is in its data and, for clients that select events by it, before them."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


class ClientDisconnectedError(Exception):
    """The client disconnected before the response was complete."""


class Source(Protocol):
    """What produces the events of a stream."""

    @property
    def is_complete(self) -> bool:
        """Whether it has ended by itself."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class EventStream(Response):
    """Sends `events`, and ends `work` as soon as the client disconnects.

    The status is sent with the first event: a request that fails before it gets an error status.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        work: Source,
        events: AsyncIterator[bytes],
        on_end: Callable[[], object],
        *,
        headers: Mapping[str, str] | None = None,
        done: bytes = DONE,
        error: Callable[[Mapping[str, Any]], bytes] = SseEncoder.error,
    ) -> None:
        """`done` follows the last event, and `error` makes the event of an error after the first one."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._work = work
        self._events = events
        self._on_end = on_end
        self._done = done
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_close_on_disconnect(receive, self._work))
        started = False
        try:
            async for event in self._events:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._done, "more_body": False})
        except Exception as error:
            answer = as_api_error(error)
            if not started:
                await answer.response()(scope, receive, send)
            else:  # the status has been sent
                await send({"type": "http.response.body", "body": self._error(answer.body), "more_body": True})
                await send({"type": "http.response.body", "body": self._done, "more_body": False})
        finally:
            if watcher.done() and not self._work.is_complete:
                scope.setdefault("state", {})["left"] = True  # for the log: the status has been sent
            watcher.cancel()
            self._work.close()
            self._on_end()


async def while_connected(receive: Receive, work: Source, answer: Awaitable[T]) -> T:
    """Returns the result of `answer`; if the client disconnects first, ends `work` and raises ClientDisconnectedError."""
    watcher = asyncio.create_task(_close_on_disconnect(receive, work))
    try:
        return await answer
    except Exception:
        if watcher.done():  # the answer is incomplete
            raise ClientDisconnectedError from None
        raise
    finally:
        watcher.cancel()
        work.close()


async def _close_on_disconnect(receive: Receive, work: Source) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    work.close()
