"""Proxies before a server, for suites that were written for one server.

Stored objects that a suite asks for by fixed ids, as its mock server allows, become objects that were stored just for the
request (`with_known_ids`). Paths without /v1 and any name of a model are accepted, as llama.cpp does (`with_any_model`).
Requests and answers are otherwise unchanged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.serving.tiny_server import listening

CHATS, RESPONSES = "/v1/chat/completions", "/v1/responses"
FIXED = {"completion_id": CHATS, "response_id": RESPONSES, "resp_677efb5139a88190b512bc3fef8e535d": RESPONSES}
"""Ids in paths, and where such objects are created."""
PREVIOUS = ("previous_response_id", "resp_123")
"""Ids in bodies."""
METHODS = ["GET", "POST", "DELETE", "OPTIONS"]
UNVERSIONED = ("chat", "completions", "embeddings", "messages", "models", "responses", "score")
"""Beginnings of paths that llama.cpp has with and without /v1."""
# The message is one of an assistant: the client has no other role in its type of a stored message.
CHAT = {"messages": [{"role": "assistant", "content": "Hi"}], "store": True, "max_tokens": 2}
RESPONSE = {"input": "Hi", "max_output_tokens": 2}


@contextlib.contextmanager
def with_known_ids(url: str, model: str) -> Iterator[str]:
    """The URL of the proxy for the server at `url`; it ends with the context."""
    http = httpx.AsyncClient(base_url=url, timeout=120)

    async def stored_at(path: str, *, background: bool) -> str:
        body = {**CHAT} if path == CHATS else {**RESPONSE, "background": background}
        answer = await http.post(path, json={"model": model, **body})
        answer.raise_for_status()
        return answer.json()["id"]

    async def known(request: Request) -> tuple[str, bytes]:
        path, body = request.url.path, await request.body()
        for part in path.split("/"):
            if part in FIXED:
                path = path.replace(part, await stored_at(FIXED[part], background=path.endswith("/cancel")))
        if b"previous_response_id" in body and (fields := json.loads(body)).get("previous_response_id") in PREVIOUS:
            previous = await stored_at(RESPONSES, background=False)
            body = json.dumps({**fields, "previous_response_id": previous}).encode()
        return path, body

    with _proxy(http, known, dropped={"after": "after"}) as address:
        yield address


@contextlib.contextmanager
def with_any_model(url: str, model: str) -> Iterator[str]:
    """The URL of the proxy for the server at `url`, with its name of the model in each body; it ends with the context."""
    http = httpx.AsyncClient(base_url=url, timeout=600)

    async def known(request: Request) -> tuple[str, bytes]:
        path, body = request.url.path, await request.body()
        if path.split("/")[1] in UNVERSIONED:
            path = f"/v1{path}"
        if request.method == "POST" and isinstance(fields := json.loads(body or b"{}"), dict):
            body = json.dumps({**fields, "model": model}).encode()
        return path, body

    with _proxy(http, known, dropped={}) as address:
        yield address


@contextlib.contextmanager
def _proxy(
    http: httpx.AsyncClient, known: Callable[[Request], Awaitable[tuple[str, bytes]]], *, dropped: Mapping[str, str]
) -> Iterator[str]:
    """The URL of a proxy that sends each request with the path and the body from `known`, without `dropped` parameters."""

    async def forward(request: Request) -> Response:
        path, body = await known(request)
        query = httpx.QueryParams([pair for pair in request.query_params.multi_items() if pair not in dropped.items()])
        kept = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        answer = await http.request(request.method, path, params=query, headers=kept, content=body)
        framing = ("content-length", "transfer-encoding")
        headers = {name: value for name, value in answer.headers.items() if name not in framing}
        return Response(answer.content, answer.status_code, headers=headers)

    app = Starlette(routes=[Route("/{path:path}", forward, methods=METHODS)])
    with listening(app) as url:
        yield url
