"""What every request passes first: size limit, key, form of the body, request id, one line in the log."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from fastgen_jax.serving.bodies import check_type, unpacked
from fastgen_jax.serving.errors import ApiError

log = logging.getLogger("fastgen_jax.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
CLIENT_DISCONNECTED = 499  # nginx's number for a client that did not wait; nobody reads it but logs and metrics
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/openapi.json"})
STARTS_PER_TURN = 4  # requests: some milliseconds
QUIET_PATHS = frozenset({"/health", "/metrics", "/stats"})  # asked every second by machines


class StartLimiter:
    """Lets a few requests begin in each turn of the event loop.

    A request is about a millisecond of work before it runs; two hundred that come at once would hold up every stream.
    """

    def __init__(self, each: int = STARTS_PER_TURN) -> None:
        self._each = each
        self._started = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait_turn(self) -> None:
        """Returns when it is one's turn, in order of arrival."""
        loop = asyncio.get_running_loop()
        if self._started == 0:
            loop.call_soon(self._turn)
        if self._started < self._each and not self._waiting:
            self._started += 1
            return
        future = loop.create_future()
        self._waiting.append(future)
        await future

    def _turn(self) -> None:
        self._started = 0
        while self._waiting and self._started < self._each:
            future = self._waiting.popleft()
            if not future.done():  # its client has not gone
                future.set_result(None)
                self._started += 1
        if self._started:
            asyncio.get_running_loop().call_soon(self._turn)


class RequestMiddleware:
    """ASGI middleware; a class of our own, because a body must be counted as it comes and streams not be buffered."""

    def __init__(
        self,
        app: Any,
        *,
        api_keys: Sequence[str],
        max_body_bytes: int,
        on_response: Callable[[str, int], object],
        origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._on_response = on_response
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._origins = origins
        self._limiter = StartLimiter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:100].decode("latin-1") or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        state = {"status": 0, "received": 0}
        refusals: list[ApiError] = []

        async def counted() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                state["received"] += len(message.get("body", b""))
                if state["received"] > self._max_body_bytes:
                    raise self._too_large(state["received"])
            return message

        body = counted

        async def noted() -> Message:
            try:
                return await body()
            except ApiError as error:
                refusals.append(error)
                raise

        async def named(message: Message) -> None:
            if refusals and not state["status"]:
                return  # what the application makes of a body that it could not read
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            try:
                self._check(scope, headers)
                if scope["method"] == "POST":
                    check_type(headers, self._origins)
                    body = unpacked(scope["headers"], counted, max_bytes=self._max_body_bytes)
                    scope["headers"] = _plain_json(scope["headers"])
                    await self._limiter.wait_turn()
                await self._app(scope, noted, named)
            except ApiError as error:
                if state["status"]:
                    raise
                refusals.append(error)
            if refusals and not state["status"]:
                refusal = refusals[0]
                refusals.clear()
                await refusal.response()(scope, receive, named)
        finally:
            # The path of the route, not that of the request: anybody can make up paths.
            self._on_response(getattr(scope.get("route"), "path", "other"), state["status"] or CLIENT_DISCONNECTED)
            is_poll = scope["path"] in QUIET_PATHS and (state["status"] < 400 or state["status"] == 503)  # still loading
            level = logging.DEBUG if is_poll else logging.INFO
            facts = scope["state"].get("log", {})
            log.log(
                level,
                "%s %s %d%s",
                scope["method"],
                scope["path"],
                state["status"],
                f": {facts['error'][:200]}" if "error" in facts else "",
                extra={
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": state["status"],
                    "request_id": request_id,
                    "milliseconds": round(1e3 * (time.perf_counter() - start), 3),
                    **facts,
                },
            )

    def _check(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large(int(length))
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and any(secrets.compare_digest(given.strip(), key) for key in self._keys):
            return
        raise ApiError(
            "this server wants a key: send the header 'Authorization: Bearer KEY'",
            status=401,
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            f"the body has {size} bytes and the limit is {self._max_body_bytes}; send less, or start the "
            "server with a larger max_body_mb",
            status=413,
            code="body_too_large",
        )


def _plain_json(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a body that was checked and unpacked."""
    replaced = (b"content-type", b"content-encoding", b"content-length")
    return [*((name, value) for name, value in headers if name not in replaced), (b"content-type", b"application/json")]
