"""`fastgen batch`: every line answered exactly once, whatever happened before."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from fastgen_jax.serving.batch import read_done, read_request, run_batch
from tests.serving.checkpoint import write_checkpoint
from tests.serving.house import MODEL, offline, with_server

OPTIONS = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


def answers(path: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {int(line["id"].removeprefix("batch-")): line for line in lines}
    assert len(found) == len(lines), "a line was answered twice"
    return found


def text_of(answer: dict) -> str:
    return answer["response"]["body"]["choices"][0]["text"]


def write_prompts(path: Path, count: int) -> list[str]:
    prompts = [f"Prompt {i}" for i in range(count)]
    path.write_text("\n".join(prompts) + "\n")
    return prompts


def test_all_forms_of_lines_are_answered_and_wrong_ones_say_why(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        "Plain text",
        json.dumps("a JSON string"),
        json.dumps({"prompt": "an object", "custom_id": "mine"}),
        json.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
        json.dumps({"custom_id": "openai", "method": "POST", "url": "/v1/completions",
                    "body": {"model": MODEL, "prompt": "x", "max_tokens": 2}}),
        "",
        json.dumps({"custom_id": "bad", "method": "POST", "url": "/v1/images", "body": {}}),
        json.dumps({"prompt": "x", "temperature": -4}),
        json.dumps({"neither": 1}),
    ]
    source.write_text("\n".join(lines))
    result = with_server(lambda http, _: run_batch(http, source, target, model=MODEL, options=OPTIONS, concurrency=4))
    got = answers(target)
    assert sorted(got) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert text_of(got[0]) == offline("Plain text", max_new_tokens=4, do_sample=False, ignore_eos=True)
    assert text_of(got[1]) == offline("a JSON string", max_new_tokens=4, do_sample=False, ignore_eos=True)
    assert [got[i]["custom_id"] for i in (2, 4, 6)] == ["mine", "openai", "bad"]
    assert got[3]["response"]["body"]["object"] == "chat.completion"
    assert got[4]["response"]["body"]["usage"]["completion_tokens"] <= 2
    assert "url is '/v1/images'" in got[6]["error"]["message"]
    assert got[7]["response"]["status_code"] == 400
    assert "needs 'body'" in got[8]["error"]["message"]
    assert (result.answered, result.failed) == (8, 3)


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_batch_goes_on_where_it_was_killed(tmp_path, cut):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = write_prompts(source, 12)

    def run():
        return with_server(lambda http, _: run_batch(http, source, target, model=MODEL, options=OPTIONS, concurrency=3))

    run()
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole[:5]) + whole[5][:cut])  # as a kill in the middle of a write leaves it
    result = run()
    assert (result.resumed, result.answered) == (5, 7)
    got = answers(target)
    assert [text_of(got[i]) for i in range(12)] == [
        offline(p, max_new_tokens=4, do_sample=False, ignore_eos=True) for p in prompts]
    assert run().answered == 0


def test_inputs_are_read_as_they_are_needed(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 3000)
    answered, most_open = 0, 0

    class Fake(httpx.AsyncBaseTransport):
        open = 0

        async def handle_async_request(self, request):
            nonlocal answered, most_open
            self.open += 1
            most_open = max(most_open, self.open)
            await asyncio.sleep(0)
            self.open -= 1
            answered += 1
            return httpx.Response(200, json={})

    async def scenario():
        async with httpx.AsyncClient(transport=Fake(), base_url="http://x") as http:
            return await run_batch(http, source, target, model=MODEL, concurrency=7)

    assert asyncio.run(scenario()).answered == 3000 == answered
    assert most_open <= 7
    assert len(answers(target)) == 3000


def test_a_busy_server_is_asked_again(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(source, 2)
    replies = iter([httpx.Response(429, headers={"retry-after": "0"}, json={}), httpx.ConnectError("not yet"),
                    httpx.Response(200, json={"ok": 1}), httpx.Response(400, json={"error": {}})])

    class Fake(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            reply = next(replies)
            if isinstance(reply, Exception):
                raise reply
            return reply

    async def scenario():
        async with httpx.AsyncClient(transport=Fake(), base_url="http://x") as http:
            return await run_batch(http, source, target, model=MODEL, concurrency=1)

    result = asyncio.run(scenario())
    assert (result.answered, result.failed) == (2, 1)
    assert answers(target)[0]["response"]["status_code"] == 200


def test_a_file_that_is_no_output_is_not_overwritten(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("my notes\nmore notes\n")
    with pytest.raises(ValueError, match="is not the output of a batch"):
        read_done(target)
    assert target.read_text() == "my notes\nmore notes\n"


def test_options_fill_only_what_a_body_leaves_open():
    _, body = read_request(json.dumps({"prompt": "x", "max_tokens": 9}), MODEL, {"max_tokens": 1, "seed": 2})
    assert body == {"model": MODEL, "prompt": "x", "max_tokens": 9, "seed": 2}


@pytest.mark.slow
def test_the_command_survives_kill_nine_with_two_replicas(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    checkpoint = write_checkpoint(tmp_path / "tiny")
    prompts = write_prompts(source, 2000)
    command = [sys.executable, "-m", "fastgen_jax.cli", "batch", str(source), str(target), "--model", str(checkpoint),
               "--replicas", "2", "--concurrency", "32", "--token-budget", "32", "--budget-ladder", "8", "--block-size", "4",
               "--max-num-seqs", "8", "--num-blocks", "128", "--set", "max_tokens=20", "--set", "temperature=0",
               "--set", "ignore_eos=true"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not target.exists() or target.read_bytes().count(b"\n") < 100:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert 100 <= target.read_bytes().count(b"\n") < 2000, "it was meant to be killed in the middle"
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    got = answers(target)
    assert sorted(got) == list(range(2000))
    for i in range(0, 2000, 100):
        assert text_of(got[i]) == offline(prompts[i], max_new_tokens=20, do_sample=False, ignore_eos=True)
