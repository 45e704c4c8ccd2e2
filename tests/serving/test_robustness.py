"""Hostile and malformed requests get an error that says what is wrong, and other requests are unaffected."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest

from fastgen_jax.api.deployment import Deployment, process_start, recorded
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.serving.middleware import StartLimiter
from fastgen_jax.serving.server import _serve, run_server
from fastgen_jax.serving.settings import ServedModel, ServerConfig
from fastgen_jax.serving.state import ServerState
from tests.serving.tiny_server import MODEL, offline, with_server

COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
GREEDY = {"do_sample": False, "ignore_eos": True}


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def form(schema: dict, **more: bool) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema, **more}}}


def field(name: str, value: bytes) -> bytes:
    return b'{"model": "tiny", "prompt": "Hi", "max_tokens": 2, "%s": %s}' % (name.encode(), value)


ODD = {
    "NaN": ("completions", field("temperature", b"NaN"), "temperature is nan: input should be a finite number"),
    "too large for a float": ("completions", field("top_p", b"1e999"), "top_p is inf: "),
    "NaN in a bias": ("completions", field("logit_bias", b'{"5": NaN}'), "logit_bias.5 is nan: "),
    "negative": ("completions", {**COMPLETION, "max_tokens": -3}, "max_tokens is -3: input should be greater than or equal"),
    "huge n": ("completions", {**COMPLETION, "n": 10**9}, "n is 1000000000: input should be less than or equal to 128"),
    "more digits than Python reads": ("completions", field("n", b"9" * 5000), "the body is not JSON"),
    "huge bias": (
        "completions",
        {**COMPLETION, "logit_bias": {str(i): 1 for i in range(10_000)}},
        "logit_bias has 10000 entries but at most 300",
    ),
    "a long key": ("completions", {**COMPLETION, "logit_bias": {"9" * 5000: 1}}, "keys must be token ids"),
    "many stops": ("completions", {**COMPLETION, "stop": ["x"] * 10_000}, "at most 1024 items"),
    "a long stop": ("completions", {**COMPLETION, "stop": "x" * 10_000}, "at most 1000 characters"),
    "many stops, MII": (
        "/mii/here",
        {"prompts": "Hi", "stop": ["x"] * 10_000},
        "stop has 10000 strings with 10000 characters in all, but at most 1024",
    ),
    "many samples, MII": ("/mii/here", {"prompts": "Hi", "n": 10**30}, "more than the 64 requests that may wait"),
    "NaN, MII": ("/mii/here", b'{"prompts": "Hi", "temperature": NaN}', "temperature is nan; it must be a finite number"),
    "no UTF-8": ("completions", field("user", b'"\xff\xfe"'), "the body is not JSON in UTF-8"),
    "half a character": ("completions", field("prompt", b'"\\ud800"'), "lone surrogate"),
    "half a character in a name": ("completions", b'{"model": "\\ud800", "prompt": "Hi"}', "is not served here"),
    "deep JSON": ("completions", b"[" * 100_000, "the body is not JSON"),
    "deep JSON in a field": (
        "chat/completions",
        json.dumps(CHAT)[:-1].encode() + b', "prediction": %s}' % (b"[" * 500 + b"]" * 500),
        "is not supported here",
    ),
    "a deep schema": ("chat/completions", {**CHAT, **form(deep(200))}, "the json schema cannot be used: recursion limit"),
    "a schema elsewhere": ("chat/completions", {**CHAT, **form({"$ref": "http://127.0.0.1:1/x"}, strict=True)}, "$ref to"),
    "no number": ("completions", {**COMPLETION, "prompt": [1.5]}, "prompt"),
    "a token below zero": ("completions", {**COMPLETION, "prompt": [-1]}, "prompt.0 is -1: input should be greater"),
    "a long prompt": ("completions", {**COMPLETION, "prompt": "x" * 100_000}, "100001 tokens but max_context_len is 128"),
    "many prompts": ("completions", {**COMPLETION, "prompt": ["x"] * 100_000}, "more than the 64 requests that may wait"),
    "an endless wait": ("completions", {**COMPLETION, "timeout": 0}, "timeout is 0: input should be greater than 0"),
    "nothing": ("completions", b"", "required"),
    "another model": ("completions", {**COMPLETION, "model": "gpt-5"}, "the model 'gpt-5' is not served here; use 'tiny'"),
}


def test_malformed_requests_are_refused_with_the_reason_and_affect_no_other_request():
    async def scenario(client, _):
        companion = asyncio.create_task(
            client.post("/v1/completions", json={**COMPLETION, "max_tokens": 90, "temperature": 0, "ignore_eos": True})
        )
        answers = {}
        for name, (path, body, _) in ODD.items():
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answers[name] = await client.post(
                path if path.startswith("/") else f"/v1/{path}",
                content=content,
                headers={"content-type": "application/json"},
            )
        return answers, (await companion).json()["choices"][0]["text"]

    answers, text = with_server(scenario)
    for name, (_, _, message) in ODD.items():
        answer = answers[name]
        assert answer.status_code in (400, 404), f"{name}: {answer.status_code} {answer.text}"
        error = answer.json()["error"]
        assert message in error["message"], name
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 1000, f"{name}: the error repeats what was sent"
    assert text == offline("Hi", max_new_tokens=90, **GREEDY)


def test_a_grammar_without_end_stops_at_the_length_limit():
    async def scenario(client, _):
        schemas = ({"$ref": "#"}, {"type": "string", "minLength": 10**9}, {"type": "string", "pattern": "(a{1,99}){1,99}"})
        return [await client.post("/v1/chat/completions", json={**CHAT, **form(schema)}) for schema in schemas]

    for answer in with_server(scenario):
        assert answer.status_code == 400 or answer.json()["choices"][0]["finish_reason"] in ("length", "stop"), answer.text


def test_a_client_that_disconnects_while_its_prompt_is_computed_leaves_nothing():
    started, release = asyncio.Event(), threading.Event()

    async def scenario(client, backend):
        loop, step = asyncio.get_running_loop(), backend._thread._step

        def held() -> None:  # runs the first of the four steps of the prompt
            step()
            loop.call_soon_threadsafe(started.set)
            release.wait(60)

        backend._thread._step = held
        before = await backend.snapshots()
        task = asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 100}))
        await started.wait()
        (stream,) = backend._streams.values()
        assert stream.outputs == 0
        stream.close()  # as the server does when the connection closes
        release.set()
        after = await backend.snapshots()
        task.cancel()
        assert after[0]["running"] == after[0]["waiting"] == 0
        assert after[0]["free_blocks"] == after[0]["blocks"]
        assert after[0]["counters"]["generated_tokens"] == before[0]["counters"]["generated_tokens"]
        await asyncio.gather(task, return_exceptions=True)

    with_server(scenario)


def test_idle_connections_and_clients_that_never_read_block_no_other_client(url):
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**COMPLETION, "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 20, "n": 8}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connections = []
    try:
        for i in range(200):
            connections.append(socket.create_connection((host, int(port))))
            if i % 2:
                connections[-1].sendall(head)  # and never the rest
        for _ in range(3):
            silent = socket.socket()
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            silent.connect((host, int(port)))
            silent.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            connections.append(silent)
        with httpx.Client(base_url=url, timeout=120) as http:
            body = {**COMPLETION, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
            texts = {http.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2)}
            assert len(texts) == 1
            while not all_free(http.get("/metrics").text):
                pass  # the requests of the clients that never read run to their end
    finally:
        for connection in connections:
            connection.close()


def all_free(metrics: str) -> bool:
    values = dict(line.split(" ") for line in metrics.splitlines() if line.startswith("fastgen:kv_blocks"))
    free, blocks = (
        next(v for k, v in values.items() if k.startswith(f"fastgen:{name}{{")) for name in ("kv_blocks_free", "kv_blocks")
    )
    return free == blocks


def test_a_port_in_use_and_a_name_in_use_are_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{port} .*choose another port, or 0"):
            run_server("nowhere", ServerConfig(port=port), EngineConfig())
    record = Deployment(
        name="nowhere",
        model="m",
        url="http://127.0.0.1:1",
        pid=os.getpid(),
        started=0.0,
        process_start=process_start(os.getpid()) or "",
    )
    with recorded(record), pytest.raises(ValueError, match=r"'nowhere' is already running .*choose another deployment_name"):
        run_server("nowhere", ServerConfig(port=0), EngineConfig())


class Endless:
    """A backend whose requests never end on their own."""

    def __init__(self):
        self.draining, self.closed = asyncio.Event(), False
        self.num_unfinished, self.is_ready, self.failure = 1, True, None
        self.in_use = asyncio.Event()

    @property
    def intake(self):
        self.in_use.set()
        return SimpleNamespace(config=SimpleNamespace(num_blocks=1, block_size=1, longest_sequence=1))

    async def drain(self, timeout):
        self.draining.set()
        await asyncio.Event().wait()

    async def close(self):
        self.closed = True


def test_a_second_signal_stops_a_server_without_waiting_for_running_requests():
    backend = Endless()

    async def load():
        return backend

    async def scenario():
        server = ServerState(ServedModel(name=MODEL, deployment="here", config=ServerConfig(drain_seconds=600)))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            loading = asyncio.create_task(load())
            serving = asyncio.create_task(_serve(server, listener, loading, [], on_ready=lambda: None))
            await backend.in_use.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await backend.draining.wait()
            assert not serving.done()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(serving, 60)

    asyncio.run(scenario())
    assert backend.closed


def test_simultaneous_requests_start_a_few_per_turn_and_in_order():
    async def scenario():
        limiter, begun, by_turn = StartLimiter(per_turn=3), [], []

        async def one(number):
            await limiter.wait_turn()
            begun.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(10)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        while not all(task.done() for task in tasks):
            before = len(begun)
            await asyncio.sleep(0)
            by_turn.append(len(begun) - before)
        assert begun == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert max(by_turn) == 3
        await one(11)  # an idle limiter does not wait
        assert begun[-1] == 11

    asyncio.run(scenario())
