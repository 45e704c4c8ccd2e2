"""Adapters of a server: model:adapter in requests, /v1/models, and vLLM's endpoints to load and unload them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from fastgen_jax import SamplingParams
from fastgen_jax.checkpoint import write_peft
from tests.adapters import COUNT, SCALE, adapter_engine, tiny_lora
from tests.serving.test_router import Fixture, run
from tests.serving.tiny_server import MODEL, ask, engine, with_server
from tests.tiny import drain, tiny_model

BODY = {"prompt": "ab", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Adapters "a0" and "a1" as PEFT saves them, and "empty"."""
    folder = tmp_path_factory.mktemp("adapters")
    for number in range(2):
        write_peft(folder / f"a{number}", tiny_lora(number), tiny_model()[1], scale=SCALE)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def shared():
    engine = adapter_engine()
    engine.reset_prefix_cache()
    yield engine
    for name in [*engine.adapters]:
        if name == "new" or engine.adapters[name].version:
            engine.unload_adapter(name)
    for number in range(COUNT):
        if f"a{number}" not in engine.adapters:
            engine.load_adapter(f"a{number}", tiny_lora(number), scale=SCALE)


def offline(engine, adapter: str | None) -> str:
    params = SamplingParams(max_new_tokens=12, do_sample=False, ignore_eos=True, adapter=adapter)
    request_id = engine.add("ab", params)
    return "".join(output.text for output in drain(engine)[request_id])


def test_the_name_of_the_model_chooses_the_adapter_of_a_request(shared):
    want = {name: offline(shared, name) for name in (None, "a0", "a3")}
    assert len({*want.values()}) == 3

    async def scenario(client: httpx.AsyncClient, backend) -> None:
        async def text(model: str, path: str = "/v1/completions", **body: object) -> str:
            answer = await client.post(path, json={**BODY, "model": model, **body})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
            return answer.json()["choices"][0]["text"]

        names = [MODEL, f"{MODEL}:a0", f"{MODEL}:a3", "a3", "here:a0"]
        texts = await asyncio.gather(*map(text, names))
        assert texts == [want[name] for name in (None, "a0", "a3", "a3", "a0")]
        chats = [(await client.post("/v1/chat/completions", json={**CHAT, "model": name})).json() for name in names[:2]]
        assert len({chat["choices"][0]["message"]["content"] for chat in chats}) == 2
        plain = await client.post(
            "/mii/here", json={"prompts": "ab", "adapter": "a3", "max_new_tokens": 12, "do_sample": False}
        )
        assert want["a3"].startswith(plain.json()[0]["generated_text"])
        beams = {**BODY, "use_beam_search": True, "n": 2, "max_tokens": 3}
        found = [(await client.post("/v1/completions", json={**beams, "model": name})).json() for name in names[:2]]
        assert len({answer["choices"][0]["text"] for answer in found}) == 2

    with_server(scenario, shared=shared)


def test_an_adapter_that_is_not_loaded_is_not_found_and_the_answer_names_those_that_are(shared):
    async def scenario(client: httpx.AsyncClient, _) -> None:
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "a"})):
            answer = await client.post(path, json={**body, "model": f"{MODEL}:other"})
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            assert "tiny:ADAPTER with one of the loaded adapters: a0, a1" in answer.json()["error"]["message"]
        answer = await client.post("/mii/here", json={"prompts": "ab", "adapter": "other"})
        assert answer.status_code == 400
        assert "adapter is 'other', which is not loaded; loaded: a0" in answer.json()["error"]["message"]
        answer = await client.post("/v1/embeddings", json={"model": f"{MODEL}:a0", "input": "ab"})
        assert answer.status_code == 404, "vectors are those of the model itself"

    with_server(scenario, shared=shared)


def test_adapters_are_loaded_replaced_listed_and_unloaded_while_the_server_runs(shared, folder: Path):
    want = offline(shared, "a0")
    shared.unload_adapter("a0")

    async def scenario(client: httpx.AsyncClient, _) -> None:
        async def change(path: str, **body: object) -> httpx.Response:
            return await client.post(f"/v1/{path}_lora_adapter", json=body)

        async def text() -> httpx.Response:
            return await client.post("/v1/completions", json={**BODY, "model": f"{MODEL}:new"})

        assert (await text()).status_code == 404
        answer = await change("load", lora_name="new", lora_path="a1")
        assert answer.json() == {"model": f"{MODEL}:new", "version": 0}
        assert (await text()).json()["choices"][0]["text"] != want
        assert (await change("load", lora_name="new", lora_path="a0")).status_code == 400
        answer = await change("load", lora_name="new", lora_path="a0", load_inplace=True)
        assert answer.json() == {"model": f"{MODEL}:new", "version": 1}
        answer = (await text()).json()
        assert answer["choices"][0]["text"] == want
        assert answer["usage"]["weight_versions"] == [[[1, 12]]]
        cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
        assert cards[MODEL]["parent"] is None
        assert cards[f"{MODEL}:new"]["parent"] == MODEL
        assert cards[f"{MODEL}:new"]["root"] == str(folder / "a0")
        assert (await client.get(f"/v1/models/{MODEL}:new")).json() == cards[f"{MODEL}:new"]
        assert (await change("unload", lora_name="new")).status_code == 200
        assert (await text()).status_code == 404
        assert (await change("unload", lora_name="new")).status_code == 404

    with_server(scenario, shared=shared, weights_folder=str(folder))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            {"lora_name": "new", "lora_path": "../x"},
            403,
            "lora_path is '../x', which is not in the folder of --weights-folder",
        ),
        ({"lora_name": "new", "lora_path": "missing"}, 404, "has no such checkpoint or adapter"),
        ({"lora_name": "a0", "lora_path": "empty", "load_inplace": True}, 400, "it has no adapter_config.json"),
        ({"lora_name": "a:b", "lora_path": "a0"}, 400, "an adapter is called 'a:b'"),
        ({"lora_name": "new", "lora_path": "a0"}, 400, "max_adapters is 8, and a0, a1"),
    ],
)
def test_adapters_that_cannot_be_loaded_are_refused(shared, folder: Path, body, status: int, message: str):
    answer = ask("/v1/load_lora_adapter", body, shared=shared, weights_folder=str(folder))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["load", "unload"])
def test_without_the_option_of_the_operator_no_adapter_is_changed(shared, path: str):
    answer = ask(
        f"/v1/{path}_lora_adapter", {"lora_name": "a0", **({"lora_path": "a0"} if path == "load" else {})}, shared=shared
    )
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "weights_disabled"
    assert "a0" in shared.adapters


def test_a_replica_that_starts_again_gets_the_adapters_of_the_others():
    engine()  # compiled before the time of `run` begins

    async def scenario() -> None:
        f = Fixture()

        def calls(number: int) -> list[tuple]:
            return [message for message in f.sent[number] if message[0] == "call"]

        def answer(number: int, result: object) -> None:
            message = ("answer", calls(number)[-1][1], result)
            f.router._handle(f.router.replicas[number], message, asyncio.Event())

        async def both(change, result: object) -> object:
            count = len(calls(1))
            task = asyncio.create_task(change)
            while len(calls(1)) == count:
                await asyncio.sleep(0)
            answer(0, result)
            answer(1, result)
            return await task

        await both(f.router.load_adapter("x", "there"), None)
        await both(f.router.load_adapter("y", "here"), None)
        assert await both(f.router.update_adapter("y", "here too"), 1) == 1
        assert calls(0)[-1][2:] == ("update_adapter", {"name": "y", "source": "here too", "version": 1})
        await both(f.router.unload_adapter("x"), None)
        assert f.router.adapters == {"y": "here too"}
        count = len(calls(1))
        f.die(1)
        f.live(1)
        while len(calls(1)) == count:
            await asyncio.sleep(0)
        assert calls(1)[-1][2:] == ("load_adapter", {"name": "y", "source": "here too", "version": 1})
        answer(1, None)
        while not f.router.replicas[1].is_ready:
            await asyncio.sleep(0)

    run(scenario)
