"""The client against a server without a model, which follows OpenAI's protocol and sends tokens at known times."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from fastgen_jax.bench.client import Target, read_stream, run_load
from fastgen_jax.bench.loads import Load, LoadRequest, closed_loop, open_loop
from fastgen_jax.bench.results import read
from fastgen_jax.bench.serve import null_server
from fastgen_jax.cli import main


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(value: str, **more: object) -> bytes:
    return event(choices=[{"index": 0, "text": value, **more}])


DONE = b"data: [DONE]\n\n"


class Dying(Target):
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Callable[[int], NoReturn], tuple[int]]:
        return os._exit, (3,)


def test_each_chunk_with_text_is_a_token_at_the_time_of_its_last_byte() -> None:
    first = text("a")
    chunks = [(1.0, first[:10]), (2.0, first[10:] + text("b")), (3.0, text("", finish_reason="length") + DONE)]
    assert read_stream(chunks) == ([2.0, 2.0], None, False)


def test_tokens_counted_only_by_the_usage_arrive_with_the_last_chunk() -> None:
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 4})
    chunks = [(1.0, text("a")), (2.0, text("bc")), (2.5, usage + DONE)]
    assert read_stream(chunks) == ([1.0, 2.0, 2.0, 2.0], 7, False)


def test_a_chunk_with_token_ids_counts_as_many_tokens() -> None:
    assert read_stream([(1.0, text("", token_ids=[5])), (2.0, text("xyz", token_ids=[6, 7]) + DONE)])[0] == [1.0, 2.0, 2.0]


def test_a_refused_request_is_recognized() -> None:
    assert read_stream([(1.0, text("", finish_reason="refused") + DONE)]) == ([], None, True)


def test_a_broken_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"ended before \[DONE\]"):
        read_stream([(1.0, text("a"))])
    with pytest.raises(ValueError, match="the server reported no memory"):
        read_stream([(1.0, event(error="no memory"))])


def test_a_closed_loop_over_http_runs_from_two_processes() -> None:
    load = closed_loop(3, num_requests=9, mean_prompt=12, mean_output=5)
    with null_server(first=0.03, gap=0.01) as url:
        outcome = run_load(Target(url=url, model="none"), load, num_processes=2)
    assert not outcome.failed
    wanted = {r.request_id: (r.num_prompt_tokens, r.max_new_tokens) for r in load.requests}
    assert {r.request_id: (r.num_prompt_tokens, len(r.token_times)) for r in outcome.finished} == wanted
    for request in outcome.finished:
        assert request.start >= outcome.begin
        assert request.time_to_first_token >= 0.03
        assert request.latency >= 0.03 + 0.009 * (len(request.token_times) - 1)
    events = sorted([(r.start, 1) for r in outcome.finished] + [(r.token_times[-1], -1) for r in outcome.finished])
    running = [sum(change for _, change in events[: i + 1]) for i in range(len(events))]
    assert max(running) <= 3


def test_a_client_process_that_fails_is_reported() -> None:
    load = closed_loop(2, num_requests=4, mean_prompt=8, mean_output=4)
    broken = Target(url="http://127.0.0.1:9/v1", model="none", extra={"seed": object()})  # not JSON
    with pytest.raises(RuntimeError, match="a client process failed: TypeError"):
        run_load(broken, load, num_processes=2)


def test_a_client_process_that_dies_is_reported() -> None:
    load = closed_loop(2, num_requests=4, mean_prompt=8, mean_output=4)
    with pytest.raises(RuntimeError, match="a client process died"):
        run_load(Dying(url="http://127.0.0.1:9/v1", model="none"), load, num_processes=2)


def test_an_open_loop_sends_on_time_without_waiting_for_answers() -> None:
    load = open_loop(50.0, num_requests=6, mean_prompt=8, mean_output=4)
    with null_server(first=0.5) as url:
        outcome = run_load(Target(url=url, model="none"), load)
    starts = [r.start - outcome.begin for r in outcome.finished]
    for start, request in zip(starts, load.requests, strict=True):
        assert start >= request.arrival
    assert max(starts) < min(r.token_times[0] for r in outcome.finished) - outcome.begin, "no request waited for an answer"


def test_failed_requests_are_counted_and_the_others_continue() -> None:
    requests = tuple(
        LoadRequest(request_id=f"r{i}", num_prompt_tokens=n, max_new_tokens=2) for i, n in enumerate((5, 500, 6))
    )
    load = Load(name="mixed", requests=requests, num_clients=1, stagger=(0.0,), facts={})
    with null_server(max_prompt=100) as url:
        outcome = run_load(Target(url=url, model="none"), load)
    assert [r.request_id for r in outcome.finished] == ["r0", "r2"]
    assert list(outcome.failed) == ["r1"]
    assert "status 400" in outcome.failed["r1"]
    assert "500 tokens" in outcome.failed["r1"]


def test_the_command_measures_several_numbers_of_clients_and_writes_the_runs(tmp_path: Path, capsys) -> None:
    results = tmp_path / "runs.jsonl"
    with null_server(first=0.005, gap=0.002) as url:
        flags = f"--url {url} --clients 1 2 --requests 4 --prompt 20 --output 6 --label null -o {results}"
        code = main(["bench", "serve", *flags.split()])
    assert code == 0
    out = capsys.readouterr().out
    assert "| 2 |" in out
    assert "effective at 4" in out
    records = read(results)
    assert [(r.label, r.num_clients, len(r.requests)) for r in records] == [("null", 1, 4), ("null", 2, 4)]
    assert {"versions", "command", "machine"} <= set(records[0].context)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--url is missing"),
        (
            ["--url", "http://127.0.0.1:9/v1", "--clients", "1", "--requests", "1", "--prompt", "8"],
            "answered no request",
        ),
        (["--url", "u", "--sla-scale", "0", "--trace", "x.csv", "--rate", "1"], "--trace and --rate are both set"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported(argv: list[str], message: str, capsys) -> None:
    assert main(["bench", "serve", *argv]) == 2
    assert message in capsys.readouterr().err
