"""New weights and pauses while streams are open: over real connections, and in replicas that are real processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.numpy import load_file, save_file

import fastgen_jax
from fastgen_jax import Engine, SamplingParams
from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.connections import Connection
from fastgen_jax.serving.settings import ServedModel, ServerConfig
from fastgen_jax.serving.state import ServerState
from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import MODEL, engine, eventually, listening, offline
from tests.tiny import drain, tokens_of

SMALL = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
LENGTH = 48
BODY = {"prompt": "ab", "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "stream": True}


def data_of(lines: Iterator[str]) -> Iterator[dict]:
    """The events of a stream, but not its end."""
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text_of(events: list[dict]) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_a_stream_that_is_open_during_a_pause_ends_with_the_text_of_one_without(tmp_path: Path, monkeypatch) -> None:
    shared, alone = engine(), offline("ab", max_new_tokens=LENGTH, do_sample=False, ignore_eos=True)
    asked, steps, step, pause = threading.Event(), [], shared.step, shared.pause

    def stepping(*args):
        steps.append(len(steps))
        if len(steps) == 6:  # in the middle of the stream
            assert asked.wait(60)
        return step(*args)

    def pausing(*args):
        asked.set()
        return pause(*args)

    monkeypatch.setitem(vars(shared), "step", stepping)
    monkeypatch.setitem(vars(shared), "pause", pausing)
    backend = AsyncEngine(shared)
    state = ServerState(
        ServedModel(name=MODEL, deployment=MODEL, config=ServerConfig(weights_folder=str(tmp_path))), backend
    )
    try:
        with (
            listening(create_app(state), http=Connection) as url,
            httpx.Client(base_url=url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json={**BODY, "model": MODEL}) as response,
        ):
            events = data_of(response.iter_lines())
            first = next(events)
            assert client.post("/v1/pause", json={"mode": "keep"}).json() == {"paused": True}
            num_steps = len(steps)
            assert num_steps < LENGTH
            assert client.get("/v1/weights").json()["replicas"] == [{"version": 0, "paused": True}]
            assert len(steps) == num_steps
            assert client.post("/v1/resume").json() == {"paused": False}
            rest = [*events]
    finally:
        backend._thread.close()
    assert text_of([first, *rest]) == alone
    assert rest[-1]["choices"][0]["finish_reason"] == "length"


class Checkpoints:
    """Two checkpoints of one model in a folder, and what greedy decoding gives with each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("old", "new"):
            write_checkpoint(folder / name)
        weights = load_file(folder / "new" / "model.safetensors")
        save_file({name: 0.8 * x if "proj" in name else x for name, x in weights.items()}, folder / "new/model.safetensors")
        self.engines = {name: Engine.from_pretrained(folder / name, **SMALL) for name in ("old", "new")}

    def tokens(self, name: str, prompt: list[int], count: int) -> list[int]:
        one = self.engines[name]
        request_id = one.add(prompt, SamplingParams(max_new_tokens=count, do_sample=False, ignore_eos=True))
        return tokens_of(drain(one)[request_id])

    def text(self, prompt: str, runs: list[tuple[str, int]]) -> str:
        """The text of an answer whose tokens come from these checkpoints, one after the other."""
        tokenizer = self.engines["old"].tokenizer
        ids = tokenizer.encode(prompt)
        tokens: list[int] = []
        for name, count in runs:
            tokens += self.tokens(name, [*ids, *tokens], count)
        return tokenizer.decode(tokens)


@pytest.mark.slow  # processes that load and compile
def test_streams_of_two_replicas_name_the_version_of_each_token_and_have_the_tokens_of_that_version(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "weights"
    folder.mkdir()
    checkpoints = Checkpoints(folder)
    client = fastgen_jax.serve(
        folder / "old", deployment_name="streams", replica_num=2, timeout=300, weights_folder=str(folder), **SMALL
    )
    url = client.deployment.url
    answers: list[tuple[str, str, list[tuple[int, int]]]] = []
    update_is_done = threading.Event()

    def ask(prompt: str) -> None:
        body = {**BODY, "model": "streams", "prompt": prompt, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            events = [*data_of(response.iter_lines())]
        runs = events[-1]["usage"].get("weight_versions", [[[0, LENGTH]]])[0]
        answers.append((prompt, text_of(events), [(version, count) for version, count in runs]))

    def ask_until_later(prompt: str) -> None:
        while not update_is_done.is_set():
            ask(prompt)
        ask(prompt)  # begins after the update

    prompts = ["ab", "cd", "ef", "gh", "ij", "kl"]
    threads = [threading.Thread(target=ask_until_later, args=(prompt,)) for prompt in prompts]
    try:
        for thread in threads:
            thread.start()
        eventually(lambda: len(answers) >= len(prompts), "answers with the old weights")
        update = {"path": "new", "version": 7, "recompute": True}
        answer = httpx.post(f"{url}/v1/weights", json=update, timeout=120)
        num_before = len(answers)
        update_is_done.set()
        assert answer.json()["version"] == 7, answer.text
        for thread in threads:
            thread.join(120)
        states = httpx.get(f"{url}/v1/weights").json()["replicas"]
        assert states == [{"version": 7, "paused": False}] * 2
    finally:
        update_is_done.set()
        client.terminate_server()
        client.close()
    assert len(answers) >= num_before + len(prompts)
    names = {0: "old", 7: "new"}
    seen = set()
    for prompt, text, runs in answers:
        versions = [version for version, _ in runs]
        assert versions in ([0], [0, 7], [7]), "a token of new weights is not followed by one of old ones"
        assert sum(count for _, count in runs) == LENGTH
        assert text == checkpoints.text(prompt, [(names[version], count) for version, count in runs])
        seen.add(tuple(versions))
    assert {(0,), (7,)} <= seen
    last = {prompt: runs for prompt, _, runs in answers}  # of each thread the one that began after the update
    assert all(runs == [(7, LENGTH)] for runs in last.values())
