"""A deployment of two replicas with real processes and sockets: found by name, used, damaged, and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import psutil
import pytest

import fastgen_jax
from fastgen_jax.api.client import ServerError
from fastgen_jax.api.deployment import deployments
from fastgen_jax.serving import server
from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import eventually, offline

GREEDY = {"do_sample": False, "ignore_eos": True}
KEY = "secret"
# The sizes of `tiny_server.engine`, whose programs are in the compile cache.
ENGINE = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The deployments of these tests are recorded in a separate folder."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME")
    if before is not None:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="module")
def client(checkpoint, state):
    client = fastgen_jax.serve(
        checkpoint,
        deployment_name="two",
        replica_num=2,
        api_key=(KEY,),
        timeout=300,
        max_body_mb=1.0,
        log_format="json",
        **ENGINE,
    )
    yield client
    client.terminate_server()
    client.close()
    assert not find_alive("two")


def find_alive(name):
    return [d for d in deployments() if d.name == name]


def replicas(client) -> list[psutil.Process]:
    return [p for p in psutil.Process(client.deployment.pid).children() if "fastgen_jax.serving.replica" in p.cmdline()]


def test_clients_find_it_by_name_and_get_the_answers_of_the_offline_engine(client):
    with pytest.raises(ValueError, match=r"no deployment 'other' is running on this machine \(running: two\)"):
        fastgen_jax.client("other")
    found = fastgen_jax.client("two", api_key=KEY)
    prompts = [f"Prompt {i}" for i in range(6)]
    want = [offline(p, max_new_tokens=8, **GREEDY) for p in prompts]
    answers = found.generate(prompts, max_new_tokens=8, logprobs=1, **GREEDY)
    assert [a.generated_text for a in answers] == want
    assert all(a.generated_length == 8 and a.finish_reason == "length" and a.logprobs for a in answers)
    assert "".join(out.text for out in found.stream(prompts[0], max_new_tokens=8, **GREEDY)) == want[0]
    pieces: list[str] = []
    found.generate(prompts[0], streaming_fn=lambda outs: pieces.extend(o.text for o in outs), max_new_tokens=8, **GREEDY)
    assert "".join(pieces) == want[0]
    chat = found.generate([{"role": "user", "content": "Hi"}], max_new_tokens=3, **GREEDY)
    assert chat[0].generated_length == 3
    with pytest.raises(ServerError, match="unknown option 'max_tokens'") as refused:
        found.generate("x", max_tokens=3)
    assert refused.value.status == 400
    found.close()


def test_clients_work_inside_a_running_event_loop(client):
    want = offline("Once", max_new_tokens=6, **GREEDY)

    async def notebook():
        blocking = client.generate("Once", max_new_tokens=6, **GREEDY)[0].generated_text
        waiting = fastgen_jax.async_client("two", api_key=KEY)
        answers = await asyncio.gather(*(waiting.generate("Once", max_new_tokens=6, **GREEDY) for _ in range(5)))
        streamed = "".join([out.text async for out in waiting.stream("Once", max_new_tokens=6, **GREEDY)])
        await waiting.close()
        return [blocking, streamed, *(a[0].generated_text for a in answers)]

    assert asyncio.run(notebook()) == [want] * 7


def test_openais_client_works_with_every_endpoint(client):
    api = openai.OpenAI(base_url=f"{client.deployment.url}/v1", api_key=KEY, max_retries=0)
    model = api.models.list().data[0].id
    assert api.models.retrieve(model).id == model
    extra = {"extra_body": {"ignore_eos": True}}
    text = offline("Once", max_new_tokens=6, **GREEDY)
    whole = api.completions.create(model=model, prompt="Once", max_tokens=6, temperature=0, logprobs=1, **extra)
    assert whole.choices[0].text == text
    streamed = api.completions.create(model=model, prompt="Once", max_tokens=6, temperature=0, stream=True, **extra)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    messages = [{"role": "user", "content": "Hi"}]
    chat = api.chat.completions.create(
        model=model, messages=messages, max_tokens=6, temperature=0, n=2, logprobs=True, top_logprobs=2, **extra
    )
    assert chat.choices[0].message.content == chat.choices[1].message.content
    assert chat.usage.completion_tokens == 12
    chunks = list(
        api.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            **extra,
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 6
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    got = api.chat.completions.create(model=model, messages=messages, max_tokens=40, response_format=form)
    assert json.loads(got.choices[0].message.content)["a"] in (1, 2)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    got = api.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=90,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    assert json.loads(got.choices[0].message.tool_calls[0].function.arguments)["a"] in (1, 2)
    vectors = [entry.embedding for entry in api.embeddings.create(model=model, input=["x", "yz", "x"]).data]
    assert vectors[0] == vectors[2] != vectors[1]  # from a replica
    with pytest.raises(openai.BadRequestError):
        api.embeddings.create(model=model, input="x" * 10_000)
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{client.deployment.url}/v1", api_key="wrong", max_retries=0).models.list()
    api.close()


def test_a_killed_replica_is_replaced_and_no_token_is_lost_or_repeated(client):
    prompts = [f"Number {i} of many" for i in range(40)]
    want = [offline(p, max_new_tokens=60, **GREEDY) for p in prompts]
    victim = replicas(client)[0].pid

    async def load():
        async with asyncio.TaskGroup() as group:
            waiting = fastgen_jax.async_client("two", api_key=KEY)

            async def stream(prompt):
                return "".join([out.text async for out in waiting.stream(prompt, max_new_tokens=60, **GREEDY)])

            async def complete(prompt):
                return (await waiting.generate(prompt, max_new_tokens=60, **GREEDY))[0].generated_text

            tasks = [group.create_task((stream if i % 2 else complete)(p)) for i, p in enumerate(prompts)]
            finished = asyncio.as_completed(tasks)
            for _ in range(3):
                await next(finished)
            os.kill(victim, signal.SIGKILL)
        await waiting.close()
        return [task.result() for task in tasks]

    assert asyncio.run(load()) == want
    http = httpx.Client(base_url=client.deployment.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    eventually(lambda: len(http.get("/stats").json()["engines"]) == 2, "the replica is back")
    assert victim not in [p.pid for p in replicas(client)]
    stats = http.get("/stats").json()
    assert stats["unfinished"] == 0
    assert all(e["free_blocks"] == e["blocks"] for e in stats["engines"])
    metrics = http.get("/metrics").text
    free = [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("fastgen:kv_blocks_free{")]
    assert free == [ENGINE["num_blocks"]] * 2
    trace = http.get("/trace").json()["traceEvents"]
    assert {event["name"] for event in trace} >= {"plan", "dispatch", "wait", "process_name"}
    http.close()


def test_the_command_line_lists_it_and_shows_its_state(client):
    def fastgen(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "fastgen_jax.cli", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "FASTGEN_API_KEY": KEY},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = fastgen("deployments")
    (row,) = [line.split() for line in listed.splitlines() if line.startswith("two ")]
    assert row[1:3] == [client.deployment.url, str(client.deployment.pid)]
    assert row[-1].endswith("two.log")
    assert "engine 1: 0 running" in fastgen("top", "two", "--once", "--interval", "0.1")
    log = Path(client.deployment.log).read_text().splitlines()
    entries = [json.loads(line) for line in log if line.startswith("{")]
    assert any(entry.get("path") == "/v1/completions" and entry.get("status") == 200 for entry in entries)
    said = [(entry.get("source"), entry["message"]) for entry in entries]
    for source in ("replica 0", "replica 1"):
        mine = " ".join(message for who, message in said if who == source)
        for part in ("opening the model: done in ", "loading llama from ", "ready in "):
            assert part in mine
    assert len(set(log)) == len(log), "an entry was logged twice"
    assert any(message.startswith("loaded and compiled in ") for _, message in said)
    assert not any(entry.get("path") in ("/health", "/metrics", "/stats") for entry in entries), "a poll was logged"


def end_while_busy(client, name):
    """Stops a deployment while four clients keep sending requests; all of their answers must be complete and correct."""
    prompts = [f"Prompt {i}" for i in range(10)]
    want = [offline(p, max_new_tokens=60, **GREEDY) for p in prompts]
    seen: queue.SimpleQueue = queue.SimpleQueue()

    def ask():
        asking = fastgen_jax.client(name, api_key=KEY)
        while True:
            try:
                seen.put([a.generated_text for a in asking.generate(prompts, max_new_tokens=60, **GREEDY)])
            except ServerError as refusal:
                seen.put(refusal.status)
                break
            except (httpx.ConnectError, httpx.RemoteProtocolError):  # it has stopped
                break
        asking.close()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    received = [seen.get(timeout=120) for _ in range(3)]
    client.terminate_server()
    for thread in threads:
        thread.join()
    received += [seen.get() for _ in range(seen.qsize())]
    assert all(answer in (503, want) for answer in received)
    assert 503 in received
    assert not find_alive(name)


@pytest.mark.slow
def test_a_wrong_option_and_a_name_in_use_are_reported_to_the_caller(client, checkpoint):
    with pytest.raises(ValueError, match="unknown argument '--bad-option'"):
        fastgen_jax.serve(checkpoint, deployment_name="bad", bad_option=1, timeout=120)
    with pytest.raises(ValueError, match=r"tensor_parallel=2 but this process has 1 cpu device"):
        fastgen_jax.serve(checkpoint, deployment_name="divided", tensor_parallel=2, timeout=120)
    with pytest.raises(ValueError, match="'two' is already running"):
        fastgen_jax.serve(checkpoint, deployment_name="two")


def test_a_stopping_server_finishes_running_requests_and_accepts_no_more(client):
    end_while_busy(client, "two")


@pytest.mark.slow
def test_a_stopping_server_with_one_engine_finishes_running_requests(checkpoint, state):
    client = fastgen_jax.serve(checkpoint, deployment_name="one", timeout=300, api_key=(KEY,), **ENGINE)
    end_while_busy(client, "one")
    client.close()


@pytest.mark.slow
def test_an_engine_may_use_several_devices(checkpoint, state, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    client = fastgen_jax.serve(checkpoint, deployment_name="divided", tensor_parallel=2, timeout=300, **ENGINE)
    prompts = ["Once", "The house", "A"]
    answers = client.generate(prompts, max_new_tokens=12, **GREEDY)
    client.terminate_server()
    client.close()
    assert [a.generated_text for a in answers] == [offline(p, max_new_tokens=12, **GREEDY) for p in prompts]


def test_a_signal_before_the_event_loop_runs_is_noted_not_raised() -> None:
    usual = signal.getsignal(signal.SIGINT)
    with server._noted_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGINT, signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is usual
