"""Responses that are generated whether or not a client waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.errors import as_api_error
from fastgen_jax.serving.responses.answer import ResponseAnswer
from fastgen_jax.serving.work import Work


class BackgroundResponse:
    """A response that is being generated, with the events of its stream so far: number i is `log[i]`."""

    def __init__(self, answer: ResponseAnswer, work: Work, *, max_tokens: int) -> None:
        """`max_tokens` is how many it may have."""
        self.log: list[bytes] = []
        self.max_tokens = max_tokens
        self._answer = answer
        self._work = work
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def response(self) -> JsonObject:
        """The response as far as it is generated."""
        return self._answer.response

    @property
    def is_complete(self) -> bool:
        """Whether it has ended."""
        return self._task is not None and self._task.done()

    def start(self, on_end: Callable[[], None]) -> None:
        """Starts to generate it."""
        self._task = asyncio.create_task(self._run(on_end))

    def close(self) -> None:
        """Ends it soon, with the status "cancelled"."""
        self._work.close()

    async def wait(self) -> None:
        """Waits until it has ended."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def follow(self, start: int) -> AsyncIterator[bytes]:
        """The events from number `start` on, as they come."""
        while True:
            changed = self._changed
            if start < len(self.log):
                yield b"".join(self.log[start:])
                start = len(self.log)
            elif self.is_complete:
                return
            else:
                await changed.wait()

    async def _run(self, on_end: Callable[[], None]) -> None:
        try:
            async for data in self._answer.events():
                self._add(data)
        except Exception as error:
            self._add(self._answer.error(as_api_error(error).body))
        finally:
            self._work.close()
            on_end()
            # Followers see that it has ended once this task is done.
            asyncio.get_running_loop().call_soon(self._wake)

    def _add(self, data: bytes) -> None:
        self.log += [event + b"\n\n" for event in data.split(b"\n\n") if event]
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Follower:
    """The stream of one client that follows a response. The response continues without it."""

    is_complete = True

    def close(self) -> None:
        """Does nothing."""
