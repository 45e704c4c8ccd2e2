"""A server with a tiny engine, in the test process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from typing import Any

import httpx
import uvicorn

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.api.async_engine import AsyncEngine, Stream
from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.connections import Connection
from fastgen_jax.serving.settings import ServedModel, ServerConfig
from fastgen_jax.serving.state import ServerState
from fastgen_jax.text import Tokenizer
from tests.tiny import drain, tiny_model

SPECIALS = ("<unk>", "<s>", "</s>")
CHARACTERS = " \nABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[\\]_{|}"
TEMPLATE = (
    "{# <tool_call> #}{% for t in tools or () %}T:{{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SHORT_TEMPLATE = (
    "{# </think> #}{% if tools %}t{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ (m.content or '')[-20:] }}\n"
    "{% endfor %}a:<think>"
)
"""Shows the end of each message, and that there are tools, and begins the reasoning of the answer."""
MODEL = "tiny"


def encode(text: str, *, add_special_tokens: bool) -> list[int]:
    """One token per character; the text of a special token becomes that token."""
    pieces = re.findall("|".join([*SPECIALS, "."]), text, re.DOTALL)
    ids = [SPECIALS.index(p) if p in SPECIALS else CHARACTERS.find(p) + 3 if p in CHARACTERS else 0 for p in pieces]
    return [1, *ids] if add_special_tokens else ids


@cache
def tokenizer(*, template: str = TEMPLATE) -> Tokenizer:
    """The 96 tokens of the tiny models: three special tokens and 93 characters."""
    texts = (*SPECIALS, *CHARACTERS)
    return Tokenizer(
        kind="one token per character",
        encoder=encode,
        texts=texts,
        pieces=[t.encode() for t in texts],
        special_ids=frozenset((0, 1, 2)),
        drops_leading_space=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        templates={"default": template},
    )


@cache
def engine(template: str = TEMPLATE) -> Engine:
    """The tiny engine with a tokenizer. Tests share it and must leave it idle."""
    params, model = tiny_model()
    config = EngineConfig(token_budget=32, budget_ladder=(8,), max_num_seqs=8, block_size=4, num_blocks=64)
    return Engine(params, model, config, tokenizer=tokenizer(template=template))


def with_server(
    scenario: Callable[[httpx.AsyncClient, AsyncEngine], Awaitable[Any]],
    *,
    max_queue: int = 64,
    shared: Engine | None = None,
    **config: Any,
) -> Any:
    """Returns the result of `scenario(client, async engine)`, and checks that it left nothing in the engine."""
    shared = shared or engine()
    assert not shared.has_work, "another test left requests in the engine"

    async def run() -> Any:
        async with AsyncEngine(shared, max_queue=max_queue) as backend:
            server = ServerState(ServedModel(name=MODEL, deployment="here", config=ServerConfig(**config)), backend)
            transport = httpx.ASGITransport(app=create_app(server))
            async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
                result = await asyncio.wait_for(scenario(client, backend), 240)
            await backend.call(lambda e: e.scheduler.check_integrity())
            assert backend.num_unfinished == 0, "a request was left in the engine"
        return result

    try:
        result = asyncio.run(run())
        assert shared.scheduler.num_free_blocks == shared.config.num_blocks
        assert shared.metrics.compiles_while_serving == 0
        return result
    finally:
        for request_id in shared.request_ids:
            shared.abort(request_id)
        drain(shared)


def ask(path: str, body: Any = None, *, headers: dict[str, str] | None = None, **config: Any) -> httpx.Response:
    """Returns the response to one request to a new server."""

    async def scenario(client: httpx.AsyncClient, _: AsyncEngine) -> httpx.Response:
        if body is None:
            return await client.get(path, headers=headers)
        return await client.post(path, json=body, headers=headers)

    return with_server(scenario, **config)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Returns the events of a stream without the last one, which must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def offline(text: str, **params: Any) -> str:
    """Returns the answer of the engine without a server."""
    from fastgen_jax import SamplingParams

    shared = engine()
    request_id = shared.add(text, SamplingParams(**params))
    return "".join(output.text for output in drain(shared)[request_id])


@contextlib.contextmanager
def listening(app: Any, **options: Any) -> Iterator[str]:
    """The URL of an ASGI application on a real socket, in a thread of this process; `options` are those of uvicorn."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, **options))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # from here on connections are accepted
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def serving(shared: Engine) -> Iterator[str]:
    """The URL of a server on a real socket, in a thread of this process, without an API key."""
    backend = AsyncEngine(shared)
    app = create_app(ServerState(ServedModel(name=MODEL, deployment=MODEL), backend))
    try:
        with listening(app, http=Connection) as url:
            yield url
    finally:
        backend._thread.close()


class Watch:
    """Lets a test wait until requests reach a backend, and until an output reaches a stream."""

    def __init__(self, backend: AsyncEngine) -> None:
        self.first_output = asyncio.Event()
        self._submitted: asyncio.Queue[Stream] = asyncio.Queue()
        self._submit = backend.submit
        backend.submit = self._submitting

    async def submitted(self) -> Stream:
        """Waits for the next request; returns its stream."""
        return await self._submitted.get()

    def _submitting(self, *args: Any, **options: Any) -> Stream:
        stream = self._submit(*args, **options)
        put = stream.put

        def putting(event: Any) -> None:
            put(event)
            self.first_output.set()

        stream.put = putting
        self._submitted.put_nowait(stream)
        return stream


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Polls until `condition` holds. Only for what other processes do: they cannot set an event."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"this did not happen in 120 s: {what}"
        time.sleep(0.05)
