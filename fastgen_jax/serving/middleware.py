"""The middleware of every request: size limit, API key, form of the body, request id, access log."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgen_jax.serving.bodies import check_type, decompressed
from fastgen_jax.serving.errors import ApiError

log = logging.getLogger("fastgen_jax.access")

CLIENT_DISCONNECTED = 499  # nginx's status for a client that disconnected; only logs and metrics show it
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/metrics", "/openapi.json"})
STARTS_PER_TURN = 4  # requests, which take a few milliseconds
QUIET_PATHS = frozenset({"/health", "/ping", "/metrics", "/stats"})  # polled every second by other programs


class StartLimiter:
    """Limits how many requests start in each turn of the event loop.

    A request takes about a millisecond before it runs, so two hundred that arrive at the same time would delay every
    stream.
    """

    def __init__(self, per_turn: int = STARTS_PER_TURN) -> None:
        self._per_turn = per_turn
        self._started = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait_turn(self) -> None:
        """Returns when the caller may start, in order of arrival."""
        loop = asyncio.get_running_loop()
        if self._started == 0:
            loop.call_soon(self._turn)
        if self._started < self._per_turn and not self._waiting:
            self._started += 1
            return
        future = loop.create_future()
        self._waiting.append(future)
        await future

    def _turn(self) -> None:
        self._started = 0
        while self._waiting and self._started < self._per_turn:
            future = self._waiting.popleft()
            if not future.done():  # cancelled if its client has disconnected
                future.set_result(None)
                self._started += 1
        if self._started:
            asyncio.get_running_loop().call_soon(self._turn)


class RequestMiddleware:
    """The ASGI middleware. It counts bodies as they arrive and does not buffer streams."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_body_bytes: int,
        on_response: Callable[[str, int], object],
        refusal: Callable[[Scope, ApiError], ASGIApp],
        origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._on_response = on_response
        self._refusal = refusal
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._origins = origins
        self._limiter = StartLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                return  # the application's response to a body that it could not read
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            try:
                self._check(scope, headers)
                if scope["method"] == "POST":
                    check_type(headers, self._origins)
                    body = decompressed(scope["headers"], counted, max_bytes=self._max_body_bytes)
                    scope["headers"] = _plain_json(scope["headers"])
                    await self._limiter.wait_turn()
                await self._app(scope, noted, named)
            except ApiError as error:
                if state["status"]:
                    raise
                refusals.append(error)
            if refusals and not state["status"]:
                refused = refusals[0]
                refusals.clear()
                await self._refusal(scope, refused)(scope, receive, named)
        finally:
            # The path of the route, not of the request: clients can send any number of different paths.
            if scope["state"].get("left") or not state["status"]:
                state["status"] = CLIENT_DISCONNECTED
            self._on_response(getattr(scope.get("route"), "path", "other"), state["status"])
            is_expected = state["status"] < 400 or state["status"] == 503  # 503 while the model loads
            is_poll = scope["path"] in QUIET_PATHS and is_expected
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

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large(int(length))
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        # Anthropic's clients send their key in a header of its own.
        given = [headers.get(b"x-api-key", b""), bearer if scheme.lower() == b"bearer" else b""]
        for key in self._keys:
            if any(secrets.compare_digest(one.strip(), key) for one in given):
                scope["state"]["key"] = key.decode()
                return
        raise ApiError(
            "this server requires an API key; send the header 'Authorization: Bearer KEY'",
            status=401,
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            f"the body has {size} bytes, more than the limit of {self._max_body_bytes}; send less, or start the "
            "server with a larger max_body_mb",
            status=413,
            code="body_too_large",
        )


def _plain_json(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of the checked and decompressed body."""
    replaced = (b"content-type", b"content-encoding", b"content-length")
    return [*((name, value) for name, value in headers if name not in replaced), (b"content-type", b"application/json")]
