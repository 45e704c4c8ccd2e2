"""Streamed answers, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi.responses import Response

from fastgen_jax.serving.answers import DONE, SseEncoder
from fastgen_jax.serving.errors import as_api_error
from fastgen_jax.serving.work import Work

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """Nobody waits for the answer any more."""


class EventStream(Response):
    """Sends the events of `make_events` and ends `work` the moment that the client disconnects.

    The status is sent with the first event, so that a request that fails before has a status that says so.
    """

    media_type = "text/event-stream"

    def __init__(self, work: Work, events: AsyncIterator[bytes], on_end: Callable[[], object]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._work = work
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watcher = asyncio.create_task(_close_on_disconnect(receive, self._work))
        begun = False
        try:
            async for event in self._events:
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if begun:
                await send({"type": "http.response.body", "body": DONE, "more_body": False})
        except Exception as error:
            answer = as_api_error(error)
            if not begun:
                await answer.response()(scope, receive, send)
            else:  # the status is out already
                await send({"type": "http.response.body", "body": SseEncoder.error(answer.body), "more_body": True})
                await send({"type": "http.response.body", "body": DONE, "more_body": False})
        finally:
            watcher.cancel()
            self._work.close()
            self._on_end()


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Work, answer: Awaitable[T]) -> T:
    """The result of `answer`; if the client disconnects first, `work` ends and ClientDisconnectedError is raised."""
    watcher = asyncio.create_task(_close_on_disconnect(receive, work))
    try:
        return await answer
    except Exception:
        if watcher.done():  # what was cut short does not make an answer
            raise ClientDisconnectedError from None
        raise
    finally:
        watcher.cancel()
        work.close()


async def _close_on_disconnect(receive: Callable[[], Awaitable[Any]], work: Work) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    work.close()
