"""A server whose engine sleeps: what shows it, what wakes it, and a server process that does it by itself."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

import fastgen_jax
from fastgen_jax import Engine
from fastgen_jax.serving.settings import ServerConfig
from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import MODEL, eventually, with_server

BODY = {"model": MODEL, "prompt": "ab", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
TIMEOUT = 120  # seconds; a test that reaches it has failed


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    engine = Engine.from_pretrained(
        checkpoint, token_budget=32, budget_ladder=(8,), max_num_seqs=8, block_size=4, num_blocks=64
    )
    engine.wait_until_compiled()
    return engine


async def status_becomes(client: httpx.AsyncClient, status: str) -> None:
    """Polls: the engine's thread publishes its state when it likes."""
    async with asyncio.timeout(TIMEOUT):
        while (answer := await client.get("/health")).json()["status"] != status:
            assert answer.status_code == 200
            await asyncio.sleep(0.01)


def asleep(metrics: str) -> float:
    (value,) = re.findall(r"^fastgen:asleep{.*} (\S+)$", metrics, re.MULTILINE)
    return float(value)


def test_only_a_request_wakes_a_sleeping_server(engine: Engine) -> None:
    async def scenario(client: httpx.AsyncClient, backend) -> None:
        before = (await client.post("/v1/completions", json=BODY)).json()["choices"][0]["text"]
        assert asleep((await client.get("/metrics")).text) == 0
        await backend.call(lambda e: e.release_memory(weights="dropped"))
        await status_becomes(client, "sleeping")
        for path in ("/", "/v1/models", "/stats", "/version", "/metrics"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/tokenize", json={"prompt": "ab"})).status_code == 200
        assert asleep((await client.get("/metrics")).text) == 1
        assert engine.is_asleep
        bad = await client.post("/v1/completions", json={**BODY, "max_tokens": "many"})
        assert bad.status_code == 400
        assert engine.is_asleep, "an invalid request must not wake it"
        after = await client.post("/v1/completions", json=BODY)
        assert after.json()["choices"][0]["text"] == before
        await status_becomes(client, "ready")

    with_server(scenario, shared=engine)


def test_streams_are_whole_although_the_engine_sleeps_as_soon_as_it_is_idle(engine: Engine) -> None:
    async def scenario(client: httpx.AsyncClient, backend) -> None:
        async def text(number: int) -> str:
            answer = await client.post("/v1/completions", json={**BODY, "prompt": "ab"[number % 2], "stream": True})
            return "".join(re.findall(r'"text":"([^"]*)"', answer.text))

        thread = backend._thread
        expected = [await text(0), await text(1)]
        thread._sleep_idle = 1e-3
        for _ in range(4):
            assert await asyncio.gather(*map(text, range(8))) == expected * 4
            await status_becomes(client, "sleeping")

    sleeps = engine.metrics.sleeps
    with_server(scenario, shared=engine)
    assert engine.metrics.sleeps >= sleeps + 4
    engine.restore_memory()


def test_a_server_that_cannot_wake_says_why_and_tries_again(engine: Engine, tmp_path: Path) -> None:
    checkpoint = Path(engine.name)

    async def scenario(client: httpx.AsyncClient, backend) -> None:
        await backend.call(lambda e: e.release_memory(weights="dropped"))
        moved = checkpoint.rename(tmp_path / "moved")
        try:
            answer = await client.post("/v1/completions", json=BODY)
        finally:
            moved.rename(checkpoint)
        assert answer.status_code == 500
        assert "cannot read its weights again" in answer.json()["error"]["message"]
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    with_server(scenario, shared=engine)


def test_the_idle_time_must_be_positive() -> None:
    for value in (0, -1.0):
        with pytest.raises(ValueError, match=f"sleep_idle is {value}; it must be a positive number"):
            ServerConfig(sleep_idle=value)


@pytest.mark.slow  # processes that load and compile
def test_replicas_of_a_real_server_fall_asleep_by_themselves_and_wake(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    checkpoint = write_checkpoint(tmp_path / "tiny")
    small = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
    client = fastgen_jax.serve(checkpoint, deployment_name="idle", replica_num=2, timeout=300, sleep_idle=0.2, **small)
    try:
        url = client.deployment.url

        def status() -> str:
            return httpx.get(f"{url}/health").json()["status"]

        answers = []
        for _ in range(2):
            answers.append(
                [r.generated_text for r in client.generate(["ab", "cd", "ef", "gh"], max_new_tokens=8, do_sample=False)]
            )
            eventually(lambda: status() == "sleeping", "both replicas sleep")
            metrics = httpx.get(f"{url}/metrics").text
            assert re.findall(r"^fastgen:asleep{.*} (\S+)$", metrics, re.MULTILINE) == ["1.0", "1.0"]
        assert answers[0] == answers[1]
    finally:
        client.terminate_server()
        client.close()
