"""Invalid, unknown, unsupported or excessive requests are refused in OpenAI's format, and other requests are unaffected."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.settings import ServedModel
from fastgen_jax.serving.state import ServerState
from tests.serving.tiny_server import MODEL, Watch, ask, events, with_server
from tests.tiny import pause_after_outputs

COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.mark.parametrize(
    ("path", "change", "param", "message"),
    [
        ("completions", {"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ("completions", {"suffix": "end"}, "suffix", "suffix='end' is not supported"),
        ("completions", {"best_of": 2, "n": 4}, "best_of", "best_of=2 is less than n=4"),
        ("completions", {"best_of": 4, "stream": True}, "best_of", "best_of=4 selects among complete answers"),
        ("completions", {"prompt": [True]}, "prompt", "prompt.0 is True"),
        ("completions", {"temperature": -1}, "temperature", "greater than or equal to 0"),
        ("completions", {"max_tokens": 0}, "max_tokens", "max_tokens=0 requests no output"),
        ("completions", {"prompt": []}, "prompt", "prompt is empty"),
        ("completions", {"prompt": [500]}, None, "token id 500 is outside the vocabulary"),
        ("completions", {"prompt": "x" * 200}, "prompt", "201 tokens but max_context_len is"),
        ("completions", {"logit_bias": {"abc": 1}}, "logit_bias", "keys must be token ids"),
        ("completions", {"logit_bias": {"4000": 1}}, "logit_bias", "logit_bias names token 4000"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "require stream=true"),
        ("completions", {"prompt": ["x"] * 100}, None, "more than the 64 requests that may wait"),
        ("completions", {"min_tokens": 9}, "min_tokens", "min_tokens is 9 but max_tokens is 4"),
        ("completions", {"logprobs": 50}, "logprobs", "less than or equal to 20"),
        ("chat/completions", {"functions": [{}]}, "functions", "functions=[{}] is not supported"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio", "audio={'voice': 'x'} is not supported"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages", "has no content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "top_logprobs requires logprobs"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice", "tool_choice requires tools"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema"}},
            "response_format",
            "json_schema and type",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "oops"}}}},
            "response_format",
            "the json schema cannot be used",
        ),
    ],
)
def test_the_error_names_the_invalid_parameter(path, change, param, message):
    base = CHAT if path.startswith("chat") else COMPLETION
    response = ask(f"/v1/{path}", {**base, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert error["param"] == param


def test_wrong_models_paths_methods_and_bodies_are_refused():
    async def scenario(client, _):
        response = await client.post("/v1/completions", json={**COMPLETION, "model": "gpt-5"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.get("/v2/nothing")).json()["error"]["code"] == "not_found"
        assert (await client.get("/v1/completions")).status_code == 405
        response = await client.post(
            "/v1/completions", content=b'{"model": "tiny", ', headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert "not JSON" in response.json()["error"]["message"]
        response = await client.post("/v1/embeddings", json={"model": "tiny"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "input")

    with_server(scenario)


def test_an_api_key_is_required_except_for_health_and_metrics():
    async def scenario(client, _):
        refused = await client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        wrong = await client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401
        for key in ("one", "two"):
            right = await client.post("/v1/completions", json=COMPLETION, headers={"Authorization": f"Bearer {key}"})
            assert right.status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200

    with_server(scenario, api_key=("one", "two"))


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused_with_and_without_content_length(announced):
    body = json.dumps({**COMPLETION, "prompt": "x" * 3000}).encode()

    async def pieces():
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    async def scenario(client, _):
        response = await client.post(
            "/v1/completions", content=body if announced else pieces(), headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

    with_server(scenario, max_body_mb=0.001)


def test_browsers_may_call_from_the_configured_origins_only():
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}

    async def scenario(client, _):
        return await client.options("/v1/completions", headers=headers)

    assert with_server(scenario, cors_origin=("http://page",)).headers["access-control-allow-origin"] == "http://page"
    assert "access-control-allow-origin" not in with_server(scenario).headers

    async def refused(client, _):
        return await client.get("/v1/models", headers={"Origin": "http://page"})

    response = with_server(refused, cors_origin=("*",), api_key=("k",))
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "*"  # so that the page can read the error


def test_a_full_queue_is_429_with_a_retry_after_header():
    async def scenario(client, backend):
        loop, held, release, watch = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), Watch(backend)

        def hold(_):
            loop.call_soon_threadsafe(held.set)
            release.wait(60)

        backend._thread.call(hold)
        await held.wait()
        first = [asyncio.create_task(client.post("/v1/completions", json=COMPLETION)) for _ in range(2)]
        for _ in first:
            await watch.submitted()
        response = await client.post("/v1/completions", json=COMPLETION)
        both = await client.post("/v1/completions", json={**COMPLETION, "n": 2})  # neither sample runs
        assert backend.num_unfinished == 2
        release.set()
        assert [(await task).status_code for task in first] == [200, 200]
        assert both.status_code == 429
        return response

    response = with_server(scenario, max_queue=2)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "queue_full"


def test_a_missed_deadline_is_408_and_must_not_be_retried():
    response = ask("/v1/completions", {**COMPLETION, "timeout": 1e-6})
    assert response.status_code == 408
    assert response.headers["x-should-retry"] == "false"
    streamed = ask("/v1/completions", {**COMPLETION, "timeout": 1e-6, "stream": True})
    assert streamed.status_code == 408  # nothing had been sent, so the status still could be


def test_an_error_in_the_middle_of_a_stream_is_an_event():
    async def scenario(client, backend):
        resume, watch = pause_after_outputs(backend), Watch(backend)
        task = asyncio.create_task(
            client.post(
                "/v1/completions",
                # Greedy: a sampled first token may have no text yet, and an error before the first text is a status.
                json={**COMPLETION, "stream": True, "max_tokens": 80, "ignore_eos": True, "temperature": 0},
            )
        )
        await watch.first_output.wait()
        backend._thread.call(_fail)
        resume.set()
        return await task

    def _fail(engine):
        pack = engine._stepper._packer.pack

        def broken(*_):
            engine._stepper._packer.pack = pack
            raise RuntimeError("broken on purpose")

        engine._stepper._packer.pack = broken  # in the next step

    last = events(with_server(scenario))[-1]
    assert "broken on purpose" in last["error"]["message"]
    assert last["error"]["type"] == "server_error"


def test_while_the_model_loads_requests_get_503_and_health_says_loading():
    import httpx

    async def scenario():
        server = ServerState(ServedModel(name=MODEL, deployment="here"))
        transport = httpx.ASGITransport(app=create_app(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            health, answer = await client.get("/health"), await client.post("/v1/completions", json=COMPLETION)
            assert (health.status_code, health.json()["status"]) == (503, "loading")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
            assert answer.headers["retry-after"]
            assert (await client.get("/metrics")).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_blocks(stream):
    body = json.dumps({**COMPLETION, "max_tokens": 90, "ignore_eos": True, "stream": stream}).encode()

    async def scenario(client, backend):
        app = client._transport.app
        resume, watch = pause_after_outputs(backend), Watch(backend)
        gone, sent = asyncio.Event(), []
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            message = next(messages, None)
            if message is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("server", 80),
            "client": None,
            "headers": [(b"content-type", b"application/json")],
            "asgi": {"version": "3.0"},
        }
        task = asyncio.create_task(app(scope, receive, send))
        await watch.first_output.wait()
        gone.set()
        await task
        resume.set()
        steps = await backend.call(lambda e: (e.metrics.steps, e.num_running))
        assert steps[1] == 0
        return sent

    sent = with_server(scenario)
    assert sum(m["type"] == "http.response.body" for m in sent) < 80


def test_a_client_that_leaves_a_stream_is_logged_with_status_499(caplog):
    body = json.dumps({**COMPLETION, "max_tokens": 90, "ignore_eos": True, "stream": True, "temperature": 0}).encode()

    async def scenario(client, backend):
        resume, watch = pause_after_outputs(backend), Watch(backend)
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            message = next(messages, None)
            if message is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message):
            if message["type"] == "http.response.body":
                gone.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        task = asyncio.create_task(client._transport.app(scope, receive, send))
        await watch.first_output.wait()
        await gone.wait()
        await asyncio.sleep(0)  # the watcher of the connection runs before more outputs arrive
        resume.set()
        await task
        return (await client.get("/metrics")).text

    with caplog.at_level("INFO", "fastgen_jax.access"):
        metrics = with_server(scenario)
    assert [record.status for record in caplog.records if record.path == "/v1/completions"] == [499]
    assert 'path="/v1/completions",status="499"' in metrics
