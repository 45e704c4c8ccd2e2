"""POST /v1/weights, /v1/pause and /v1/resume: new weights for a server whose streams go on, and who may send them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastgen_jax
from fastgen_jax import SamplingParams
from fastgen_jax.serving.settings import ServerConfig
from tests.serving.checkpoint import write_checkpoint
from tests.serving.test_router import Fixture, run
from tests.serving.tiny_server import CHARACTERS, MODEL, SPECIALS, Watch, ask, engine, eventually, offline, with_server

TEXTS = (*SPECIALS, *CHARACTERS)
BODY = {"model": MODEL, "prompt": "ab", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints "same", with the weights of the engine, "other", and "narrow", of another model."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("same", "other", "narrow"):
        write_checkpoint(folder / name)
    weights = load_file(folder / "other" / "model.safetensors")
    rng = np.random.default_rng(0)
    changed = {name: (x * rng.uniform(0.5, 1.5, x.shape)).astype(x.dtype) for name, x in weights.items()}
    save_file(changed, folder / "other" / "model.safetensors")
    config = folder / "narrow" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    return folder


@pytest.fixture
def shared(folder: Path):
    shared = engine()
    yield shared
    shared.update_params(folder / "same", version=0)


def text_of(stream: str) -> str:
    return "".join(json.loads(f'"{part}"') for part in re.findall(r'"text":"((?:[^"\\]|\\.)*)"', stream))


def test_streams_go_on_while_weights_are_replaced_and_usage_says_which_computed_each_token(shared, folder: Path):
    plain = offline("ab", max_new_tokens=40, do_sample=False, ignore_eos=True)

    async def scenario(client: httpx.AsyncClient, backend) -> list[str]:
        assert "weight_versions" not in (await client.post("/v1/completions", json=BODY)).json()["usage"]
        watch = Watch(backend)
        options = {"stream": True, "stream_options": {"include_usage": True}, "prompt": ["ab"] * 4}
        task = asyncio.create_task(client.post("/v1/completions", json={**BODY, **options}))
        await watch.first_output.wait()
        await client.post("/v1/pause", json={})  # so that the exchange comes before the end
        assert (await client.get("/v1/weights")).json() == {"replicas": [{"version": 0, "paused": True}]}
        answer = await client.post("/v1/weights", json={"path": "other", "version": 12, "recompute": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["version"] == 12
        assert (await client.post("/v1/resume")).json() == {"paused": False}
        assert (await client.get("/v1/weights")).json() == {"replicas": [{"version": 12, "paused": False}]}
        stream = (await task).text
        runs = json.loads(re.findall(r'"weight_versions": ?(\[\[.*?\]\]\])', stream)[-1])
        assert len(runs) == 4
        for (first, num_old), (second, num_new) in runs:
            assert (first, second, num_old + num_new) == (0, 12, 40)
        one = (await client.post("/v1/completions", json=BODY)).json()
        assert one["usage"]["weight_versions"] == [[[12, 40]]]
        plain = await client.post("/mii/here", json={"prompts": "ab", "max_new_tokens": 4, "ignore_eos": True})
        assert plain.json()[0]["weight_versions"] == [[12, 4]]
        assert (await client.post("/v1/weights", json={"path": "same"})).json()["version"] == 13
        return [one["choices"][0]["text"], (await client.post("/v1/completions", json=BODY)).json()["choices"][0]["text"]]

    other, same = with_server(scenario, shared=shared, weights_folder=str(folder))
    assert same == plain != other
    assert shared.metrics.compiles_while_serving == 0


def test_paused_requests_can_end_with_what_they_have(shared, folder: Path):
    async def scenario(client: httpx.AsyncClient, backend) -> None:
        watch = Watch(backend)
        task = asyncio.create_task(client.post("/v1/completions", json={**BODY, "max_tokens": 100}))
        await watch.first_output.wait()
        assert (await client.post("/v1/pause", json={"mode": "abort"})).json() == {"paused": True}
        choice = (await task).json()["choices"][0]
        assert choice["finish_reason"] == "abort"
        waiting = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await watch.submitted()
        await watch.submitted()
        await client.post("/v1/resume")
        assert (await waiting).json()["choices"][0]["finish_reason"] == "length"

    with_server(scenario, shared=shared, weights_folder=str(folder))


def test_a_server_that_ends_while_it_is_paused_finishes_its_requests(shared, folder: Path):
    async def scenario(client: httpx.AsyncClient, backend) -> None:
        await client.post("/v1/pause", json={})
        watch = Watch(backend)
        task = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await watch.submitted()
        assert await backend.drain(60)
        assert (await task).status_code == 200

    with_server(scenario, shared=shared, weights_folder=str(folder))


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/weights", {"path": "other"}), ("/v1/pause", {}), ("/v1/resume", {})], ids=lambda x: str(x)
)
def test_without_the_option_of_the_operator_nothing_is_changed(path: str, body):
    answer = ask(path, body)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "weights_disabled"
    assert "start it with --weights-folder FOLDER" in answer.json()["error"]["message"]
    assert not engine().is_paused


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"path": "../elsewhere"}, 403, "is not in the folder of --weights-folder"),
        ({"path": "/etc"}, 403, "is not in the folder of --weights-folder"),
        ({"path": "missing"}, 404, "has no such checkpoint"),
        ({"path": "x\0y"}, 404, "has no such checkpoint"),
        ({"path": "narrow"}, 400, "holds another model than this engine's"),
        ({"path": "empty"}, 400, "empty"),
        ({"path": "same", "version": -1}, 400, "version is -1"),
        ({"path": "same", "force": True}, 400, "unknown field 'force'"),
        ({}, 400, "path is required"),
    ],
)
def test_other_paths_and_other_models_are_refused(shared, folder: Path, body, status: int, message: str):
    (folder / "empty").mkdir(exist_ok=True)
    version = shared.weight_version
    answer = ask("/v1/weights", body, weights_folder=str(folder))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert shared.weight_version == version


def test_an_unknown_mode_is_refused(folder: Path):
    answer = ask("/v1/pause", {"mode": "stop"}, weights_folder=str(folder))
    assert answer.status_code == 400
    assert "mode is 'stop'" in answer.json()["error"]["message"]


def test_the_folder_must_exist(tmp_path: Path):
    with pytest.raises(ValueError, match=r"weights_folder is .*missing', which is not a folder"):
        ServerConfig(weights_folder=str(tmp_path / "missing"))


def test_a_replica_that_starts_again_gets_the_weights_and_the_pause_of_the_others():
    async def scenario() -> None:
        f = Fixture()

        def calls(number: int) -> list[tuple]:
            return [message for message in f.sent[number] if message[0] == "call"]

        def answer(number: int, result: object) -> None:
            message = ("answer", calls(number)[-1][1], result)
            f.router._handle(f.router.replicas[number], message, asyncio.Event())

        async def sent(number: int, count: int) -> None:
            while len(calls(number)) < count:
                await asyncio.sleep(0)

        update = asyncio.create_task(f.router.update_params("there"))
        await sent(1, 1)
        assert calls(0)[0][2:] == ("update_params", {"params": "there", "version": 1, "recompute": False})
        answer(0, 1)
        answer(1, 1)
        assert await update == 1
        pause = asyncio.create_task(f.router.pause())
        await sent(1, 2)
        answer(0, None)
        answer(1, None)
        await pause
        f.die(1)
        f.live(1)
        await sent(1, 3)
        assert not f.router.replicas[1].is_ready
        assert calls(1)[2][2:] == ("update_params", {"params": "there", "version": 1})
        answer(1, 1)
        await sent(1, 4)
        assert calls(1)[3][2:] == ("pause", {"mode": "keep"})
        answer(1, None)
        while not f.router.replicas[1].is_ready:
            await asyncio.sleep(0)
        update = asyncio.create_task(f.router.update_params("nowhere"))
        await sent(1, 5)
        answer(0, 2)
        answer(1, ValueError("it is gone"))
        with pytest.raises(ValueError, match=r"it is gone \(replica 1\)"):
            await update

    run(scenario)


@pytest.mark.slow  # processes that load and compile
def test_replicas_of_a_real_server_get_new_weights(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    small = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
    client = fastgen_jax.serve(
        folder / "same", deployment_name="trained", replica_num=2, timeout=300, weights_folder=str(folder), **small
    )
    try:
        url = client.deployment.url
        prompts, options = ["ab", "cd", "ef", "gh"], {"max_new_tokens": 8, "do_sample": False}
        before = client.generate(prompts, **options)
        answer = httpx.post(f"{url}/v1/weights", json={"path": "other", "version": 3}, timeout=120)
        assert answer.json()["version"] == 3, answer.text
        after = client.generate(prompts, **options)
        assert [response.generated_text for response in after] != [response.generated_text for response in before]
        assert all(response.weight_versions == ((3, response.generated_length),) for response in after)
        assert httpx.post(f"{url}/v1/pause", json={"mode": "wait"}, timeout=120).json() == {"paused": True}
        states = httpx.get(f"{url}/v1/weights").json()["replicas"]
        assert states == [{"version": 3, "paused": True}] * 2
        httpx.post(f"{url}/v1/resume", timeout=120)
        eventually(lambda: not any(r["paused"] for r in httpx.get(f"{url}/v1/weights").json()["replicas"]), "both resume")
    finally:
        client.terminate_server()
        client.close()


def test_log_probabilities_are_reported_as_they_are_drawn_from():
    params = {"temperature": 0.5, "top_p": 0.7, "seed": 3, "logprobs_mode": "processed", "ignore_eos": True}
    body = {"model": MODEL, "prompt": "abcd", "max_tokens": 6, "logprobs": 0, "echo": True, **params}
    told = ask("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == len(told["log_kept_masses"]) == len(told["tokens"]) == 11
    assert told["token_logprobs"][0] is told["log_kept_masses"][0] is None
    ids = [1, *(TEXTS.index(text) for text in told["tokens"][1:])]
    (scores,) = engine().score([ids], SamplingParams(temperature=0.5, top_p=0.7))
    assert scores.processed_logprobs is not None
    assert scores.log_kept_masses is not None
    assert told["token_logprobs"][1:] == np.maximum(scores.processed_logprobs, -9999).tolist()
    assert told["log_kept_masses"][1:] == scores.log_kept_masses.tolist()
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "logprobs": True, **params}
    for entry in ask("/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] <= 0
        assert np.log(0.7) - 1e-5 <= entry["log_kept_mass"] <= 0
    scored = {"prompts": [[5, 6, 7]], "prompt_logprobs": 0, "max_new_tokens": 1, "top_k": 1, "logprobs_mode": "processed"}
    (answer,) = ask("/mii/here", scored).json()
    assert {entry[4] for entry in answer["prompt_logprobs"]} <= {0, -9999}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": "a", "logprobs": 2}, "logprobs=2 requests other tokens"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2},
            "omit it",
        ),
        ("completions", {"prompt": "a", "logprobs": 0, "echo": True, "presence_penalty": 1}, "presence_penalty is 1"),
    ],
)
def test_what_has_no_processed_log_probability_is_refused(path: str, body, message: str):
    answer = ask(f"/v1/{path}", {"model": MODEL, "logprobs_mode": "processed", **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
