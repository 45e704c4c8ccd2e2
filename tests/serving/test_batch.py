"""`fastgen batch`: every line is answered exactly once, after failures and kills too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fastgen_jax.api.deployment import Deployment, process_start, recorded
from fastgen_jax.cli import main
from fastgen_jax.serving import batch
from fastgen_jax.serving.batch import Batch, run_batch
from tests.serving.batches import Echo, answers, line, run, write_prompts
from tests.serving.checkpoint import write_checkpoint
from tests.serving.tiny_server import MODEL, offline, with_server

OPTIONS = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


def text_of(answer: dict) -> str:
    return answer["response"]["body"]["choices"][0]["text"]


def test_all_forms_of_lines_are_answered_and_invalid_ones_say_why(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        json.dumps({"prompt": "Plain object"}),
        json.dumps("a JSON string"),
        json.dumps({"prompt": "an object", "custom_id": "mine"}),
        json.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
        json.dumps(
            {
                "custom_id": "openai",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": MODEL, "prompt": "x", "max_tokens": 2},
            }
        ),
        "",
        json.dumps({"custom_id": "bad", "method": "POST", "url": "/v1/images", "body": {}}),
        json.dumps({"prompt": "x", "temperature": -4}),
        json.dumps({"neither": 1}),
    ]
    source.write_text("\n".join(lines))
    result = with_server(lambda http, _: run_batch(http, source, target, model=MODEL, options=OPTIONS, concurrency=4))
    got = answers(target)
    assert sorted(got) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert text_of(got[0]) == offline("Plain object", max_new_tokens=4, do_sample=False, ignore_eos=True)
    assert text_of(got[1]) == offline("a JSON string", max_new_tokens=4, do_sample=False, ignore_eos=True)
    assert [got[i]["custom_id"] for i in (2, 4, 6)] == ["mine", "openai", "bad"]
    assert got[3]["response"]["body"]["object"] == "chat.completion"
    assert got[4]["response"]["body"]["usage"]["completion_tokens"] <= 2
    assert "url is '/v1/images'" in got[6]["error"]["message"]
    assert got[7]["response"]["status_code"] == 400
    assert "requires 'body'" in got[8]["error"]["message"]
    assert (result.answered, result.failed) == (8, 3)


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_batch_continues_after_a_kill(tmp_path, cut):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts = write_prompts(source, 12)

    def run():
        return with_server(lambda http, _: run_batch(http, source, target, model=MODEL, options=OPTIONS, concurrency=3))

    run()
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:5]) + lines[5][:cut])  # as a kill during a write leaves it
    result = run()
    assert (result.resumed, result.answered) == (5, 7)
    got = answers(target)
    assert [text_of(got[i]) for i in range(12)] == [
        offline(p, max_new_tokens=4, do_sample=False, ignore_eos=True) for p in prompts
    ]
    assert run().answered == 0


def test_inputs_are_read_only_when_they_are_needed(tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
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


def test_requests_to_a_busy_server_are_retried(tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    write_prompts(source, 2)
    replies = iter(
        [
            httpx.Response(429, headers={"retry-after": "0"}, json={}),
            httpx.ConnectError("not yet"),
            httpx.Response(200, json={"ok": 1}),
            httpx.Response(400, json={"error": {}}),
        ]
    )

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


def test_lines_answered_with_an_error_fail_and_are_sent_again_by_the_next_run(tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("fine\n404\n500\nalso fine\n")
    first = run(source, target)
    assert (first.answered, first.failed) == (4, 2)
    assert "HTTP 404" in " ".join(first.failures)
    again = run(source, target)  # they still fail
    assert (again.resumed, again.answered, again.failed) == (2, 2, 2)
    source.write_text("fine\nfixed\n500\nalso fine\n")
    last = run(source, target)
    assert (last.resumed, last.answered, last.failed) == (2, 2, 1)
    assert sorted(answers(target)) == [0, 1, 2, 3]


def test_answers_that_are_not_json_and_texts_that_are_not_utf8_do_not_end_the_batch(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line(custom_id="\ud800 \u2028") + b"\n" + line(custom_id="2", body={"prompt": "<html>"}))

    class Page(Echo):
        async def handle_async_request(self, request):
            await super().handle_async_request(request)
            return httpx.Response(502 if not self.bodies[1:] else 404, text="<html>", headers={"retry-after": "Fri, 1 Jan"})

    batch_result = run(source, target, Page(), concurrency=1)
    assert batch_result.failed == 2
    got = answers(target)
    assert got[0]["custom_id"] == "\ud800 \u2028"
    assert got[1]["response"]["body"] == "<html>"


def test_a_file_that_is_not_an_output_is_left_unchanged(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(line())
    for text in ("my notes\nmore notes\n", "one line without an end", '{"id": "batch-7"}\n', '{"id": "else", "error": 1}\n'):
        target = tmp_path / "out.jsonl"
        target.write_text(text)
        with pytest.raises(ValueError, match="is not the output of a batch"):
            run(source, target)
        assert target.read_text() == text
    for target in (source, tmp_path / "link.jsonl"):
        if target != source:
            target.symlink_to(source)
        with pytest.raises(ValueError, match="is the input itself"):
            run(source, target)
    assert source.read_bytes() == line()
    with pytest.raises(ValueError, match=r"the folder .*missing of the output does not exist; create it: mkdir -p"):
        run(source, tmp_path / "missing" / "out.jsonl")
    with pytest.raises(ValueError, match="is not a file"):
        run(source, tmp_path)


def test_the_output_of_another_input_is_refused(tmp_path):
    source, other, target = tmp_path / "in.jsonl", tmp_path / "other.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line() + b"\n" + line(custom_id="2"))
    run(source, target)
    for content in (line(custom_id="else") + b"\n" + line(custom_id="2"), line()):
        other.write_bytes(content)
        with pytest.raises(ValueError, match="has answers to another input"):
            run(other, target)
    assert run(source, target).answered == 0


def test_two_batches_cannot_write_to_the_same_file(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line() + b"\n" + line(custom_id="2", body={"prompt": "404"}))
    for _ in range(2):  # the second run replaces the output
        with Batch(source, target), pytest.raises(ValueError, match="another batch is writing"):
            run(source, target)
        run(source, target)


def test_a_full_disk_leaves_complete_answers_and_the_batch_continues_later(tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    write_prompts(source, 40)

    async def scenario():
        with Batch(source, target) as full:
            async with httpx.AsyncClient(transport=Echo(), base_url="http://x") as http:
                await full.run(http, model=MODEL, concurrency=8)

    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # the system refuses to write more, as on a full disk
    try:
        with pytest.raises(ValueError, match=r"out\.jsonl cannot be written: .*run the same batch again"):
            asyncio.run(scenario())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    complete = answers(target)
    assert 0 < len(complete) < 40
    result = run(source, target)
    assert (result.resumed, result.answered) == (len(complete), 40 - len(complete))
    assert sorted(answers(target)) == list(range(40))


def test_a_missing_server_ends_the_batch_and_a_loading_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "GIVE_UP_SECONDS", 0.0)
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\nb\n")
    loading = httpx.Response(503, json={"error": {"message": "wait", "code": "loading"}})
    ending = httpx.Response(503, json={"error": {"message": "it ends", "code": "shutting_down"}})
    replies = iter([loading, httpx.Response(200, json={}), ending])

    class Dying(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            return next(replies)

    with pytest.raises(ConnectionError, match=r"no answer from the server .* answers 503: it ends"):
        run(source, target, Dying(), concurrency=1)
    assert sorted(answers(target)) == [0]


def test_a_line_that_the_server_never_answers_does_not_end_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "GIVE_UP_SECONDS", 3600.0)
    monkeypatch.setattr(batch, "LINE_SECONDS", 0.0)
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("504\nfine\n")
    assert run(source, target, concurrency=1).failed == 1
    assert answers(target)[0]["response"]["status_code"] == 504


@pytest.fixture
def deployed(url, tmp_path, monkeypatch):
    """The server of this process, registered as a deployment."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    record = Deployment(
        name=MODEL, model=MODEL, url=url, pid=os.getpid(), started=0.0, process_start=process_start(os.getpid()) or ""
    )
    with recorded(record):
        yield MODEL


def test_the_command_reports_failures_and_its_exit_code_does_too(deployed, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": str(i), "prompt": "Once", "max_tokens": 2} for i in range(3)]
    source.write_text(
        "\n".join(json.dumps(entry) for entry in [*lines, {**lines[0], "custom_id": "x", "model": "other"}])
        + '\n{"custom_id": "y", "prompt": "x", "seed": NaN}\n'
    )
    command = ["batch", str(source), str(target), "--deployment", deployed]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("5 lines: 3 answered, 2 failed; ")
    assert "batch-3 ('x'): HTTP 404: the model 'other' is not served here" in shown.err
    assert "batch-4 ('y'): 'NaN' is not a number in JSON" in shown.err
    assert "\x1b" not in shown.err
    assert "\r" not in shown.err
    assert main(command) == 1
    assert "0 answered, 2 failed, 3 already answered before" in capsys.readouterr().out
    source.write_text("\n".join(json.dumps(entry) for entry in lines))
    assert main(command) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in.jsonl", "no/out.jsonl"), "the folder no of the output does not exist"),
        (("none.jsonl", "out.jsonl"), "none.jsonl is not a file"),
        (("in.jsonl", "in.jsonl"), "in.jsonl is the input itself"),
        (("in.jsonl", "out.jsonl", "--deployment", "none"), "no deployment 'none' is running on this machine"),
    ],
)
def test_a_command_that_cannot_start_says_why_in_one_line(deployed, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(line())
    assert main(["batch", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said
    assert Path("in.jsonl").read_bytes() == line()


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_the_command_continues_after_a_kill_and_an_interrupt_with_two_replicas(tmp_path, signal_number):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    checkpoint = write_checkpoint(tmp_path / "tiny")
    prompts = write_prompts(source, 2000)
    command = [
        sys.executable,
        "-m",
        "fastgen_jax.cli",
        "batch",
        str(source),
        str(target),
        "--model",
        str(checkpoint),
        "--replicas",
        "2",
        "--concurrency",
        "32",
        "--token-budget",
        "32",
        "--budget-ladder",
        "8",
        "--block-size",
        "4",
        "--max-num-seqs",
        "8",
        "--num-blocks",
        "128",
        "--set",
        "max_tokens=20",
        "--set",
        "temperature=0",
        "--set",
        "ignore_eos=true",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not target.exists() or target.read_bytes().count(b"\n") < 100:
            with pytest.raises(subprocess.TimeoutExpired):  # it is still running
                process.wait(0.02)
        process.send_signal(signal_number)
        _, said = process.communicate(timeout=120)
    if signal_number == signal.SIGINT:
        assert process.returncode == 130, said
        (last,) = said.splitlines()
        assert last.startswith("2000 lines: ")
        assert last.endswith(" remaining; run the same command to resume")
    assert 100 <= target.read_bytes().count(b"\n") < 2000, "it ended before it was killed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    got = answers(target)
    assert sorted(got) == list(range(2000))
    for i in range(0, 2000, 100):
        assert text_of(got[i]) == offline(prompts[i], max_new_tokens=20, do_sample=False, ignore_eos=True)
