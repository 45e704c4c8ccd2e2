"""Workers, tested with a fake engine: a real process that follows the protocol and generates known tokens."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fastgen_jax.bench import offline
from fastgen_jax.bench.machine import busy_seconds, describe, disturbance, machine_lock
from fastgen_jax.bench.metrics import summarize
from fastgen_jax.bench.peers import Peer, Worker
from fastgen_jax.bench.workloads import make_workload
from fastgen_jax.cli import main

FAKE = Path(__file__).parent / "programs" / "fake_worker.py"
WORKLOAD = make_workload("tiny", num_requests=3, mean_prompt=6, mean_output=5, vocab_size=1000, spread=0.0)


def fake(name: str = "fake", **options: object) -> Peer:
    return Peer(name=name, python=sys.executable, script=FAKE, options=options)


def test_a_worker_receives_requests_and_returns_times_and_tokens() -> None:
    with Worker(fake()) as worker:
        assert worker.description["engine"] == "fake"
        result = worker.run(WORKLOAD)
    first = WORKLOAD.requests[0]
    assert result.token_ids[first.request_id] == [first.prompt_token_ids[0] + i for i in range(5)]
    assert summarize(result.times).output_rate == pytest.approx(15 / 1.25)


def test_a_worker_runs_many_rounds_in_one_process_that_is_stopped_in_between() -> None:
    with Worker(fake()) as worker:
        (pid,) = {worker.run(WORKLOAD).extras["pid"] for _ in range(3)}
        status = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # waits for the kernel to stop it
        assert status is not None
        assert (status.si_code, status.si_status) == (os.CLD_STOPPED, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_cannot_load_is_reported_with_the_end_of_its_log() -> None:
    with pytest.raises(RuntimeError, match=r"the worker of fake ended(.|\n)*no weights here"), Worker(fake(fail="load")):
        pass


def test_a_worker_that_dies_during_a_run_is_reported() -> None:
    with Worker(fake(fail="run")) as worker, pytest.raises(RuntimeError, match="the worker of fake ended"):
        worker.run(WORKLOAD)


def test_an_engine_that_stops_early_is_not_compared() -> None:
    with Worker(fake(missing=1)) as worker, pytest.raises(RuntimeError, match="4 tokens for tiny-0 instead of 5"):
        worker.run(WORKLOAD)


def test_engines_are_interleaved_and_every_run_is_recorded(tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    arguments = parser.parse_args(["--rounds", "2", "--results", str(results), "--exclusive-lock", str(tmp_path / "l")])
    runs = offline.measure([fake("A"), fake("B")], [WORKLOAD], arguments, {"machine": describe(), "command": "test"})
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(record["round"], record["engine"]) for record in records] == [(1, "A"), (1, "B"), (2, "B"), (2, "A")]
    assert {record["output_rate"] for record in records} == {15 / 1.25}
    table = offline.comparison(WORKLOAD, {name: runs[name, "tiny"] for name in ("A", "B")})
    rows = [line for line in table if line.startswith(("| A", "| B"))]
    assert len(rows) == 2
    assert all(row.endswith("| 1.00 | 3/3 |") and "| 12.0 | 12.0-12.0 |" in row for row in rows)


def spin(cpu_seconds: float) -> None:
    end = time.process_time() + cpu_seconds
    while time.process_time() < end:
        pass


def foreign_seconds(worker: Worker) -> tuple[float, float]:
    """CPU seconds of other programs during a run, and of the whole machine; exact however busy the machine is."""
    busy, began = busy_seconds(), time.perf_counter()
    result = worker.run(WORKLOAD)
    return result.foreign_cores * (time.perf_counter() - began), busy_seconds() - busy


def test_an_engines_own_work_is_not_counted_as_a_disturbance() -> None:
    with Worker(fake(spin=0.5)) as worker:
        others, everything = foreign_seconds(worker)
    assert others <= everything - 0.4  # the clocks count in ticks of 10 ms and are not read at one instant


def test_work_of_other_programs_is_measured(tmp_path: Path) -> None:
    done = tmp_path / "done"
    os.mkfifo(done)

    def disturb() -> None:
        spin(0.5)
        done.open("w").close()  # the worker's run ends

    with Worker(fake(until=str(done))) as worker:
        threading.Thread(target=disturb, daemon=True).start()
        others, _ = foreign_seconds(worker)
    assert others >= 0.4


def test_a_disturbed_run_is_marked() -> None:
    assert disturbance(0.0) == ""
    assert "1.3 cores busy" in disturbance(1.3)


def test_an_exclusive_lock_excludes_others_and_a_shared_one_does_not(tmp_path: Path) -> None:
    import fcntl

    lock = tmp_path / "lock"
    with machine_lock(lock, mode="exclusive"), lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with machine_lock(lock, mode="shared"), lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is nothing to measure"),
        (["--rounds", "0"], "rounds is 0"),
        (["--hf-python", "p"], "need --hf-model"),
        (["--llama-server", "s"], "at least one --gguf NAME=PATH"),
        (["--also", "dtype=bfloat16", "--vllm-python", "p", "--hf-model", "f"], "--also needs --model"),
        (["--baseline", "/nowhere", "--vllm-python", "p", "--hf-model", "f"], "--baseline needs --model"),
        (["--baseline", "/nowhere", "--model", "m"], "/nowhere is not a source tree of fastgen_jax"),
        (["--workload", "custom", "--requests", "0"], "num_requests is 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported(argv: list[str], message: str, capsys) -> None:
    assert main(["bench", "offline", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gguf", "nameless"], "argument --gguf: 'nameless' is not of the form NAME=VALUE"),
        (["--option", "token_budgets=8"], "argument --option: unknown option 'token_budgets'; did you mean 'token_budget'?"),
        (["--also", "dtype=bfloat16 quantise=int8"], "argument --also: unknown option 'quantise'; did you mean 'quantize'?"),
    ],
)
def test_a_malformed_or_unknown_option_is_reported_with_its_flag(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "offline", *argv])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastgen bench offline: {message}")
    assert error.count("\n") == 1


def test_the_time_of_a_process_group_is_part_of_the_machines() -> None:
    before = busy_seconds(), busy_seconds(os.getpgrp())
    spin(0.3)
    after = busy_seconds(), busy_seconds(os.getpgrp())
    assert after[1] - before[1] >= 0.2  # counted in ticks of 10 ms
    assert after[0] - before[0] >= after[1] - before[1] - 0.1


def test_engines_are_sized_for_the_largest_workload() -> None:
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    arguments = parser.parse_args(
        shlex.split(
            "--model m --option token_budget=256 --option quantize=int8 "
            "--vllm-python v --hf-python h --hf-model folder --llama-server s --gguf F16=f.gguf"
        )
    )
    peers = offline.choose_peers(arguments, [WORKLOAD], threads=2)
    by_name = {peer.name: peer.options for peer in peers}
    assert list(by_name) == ["fastgen_jax", "vllm", "llama.cpp F16", "transformers static"]
    config = by_name["fastgen_jax"]["config"]
    assert config == {
        "prefix_caching": False,
        "max_context_len": 11,
        "max_num_seqs": 3,
        "token_budget": 256,
        "quantize": "int8",
    }
    assert (by_name["vllm"]["max_model_len"], by_name["vllm"]["max_num_seqs"]) == (11, 3)
    assert (by_name["llama.cpp F16"]["slots"], by_name["llama.cpp F16"]["context_per_slot"]) == (3, 11)


def test_this_engine_can_be_measured_with_several_sets_of_options() -> None:
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    arguments = parser.parse_args(
        shlex.split("--model m --option token_budget=256 --also dtype=bfloat16 --also 'quantize=int8 token_budget=128'")
    )
    peers = offline.choose_peers(arguments, [WORKLOAD], threads=2)
    names = ("dtype", "quantize", "token_budget")
    configs = {peer.name: {name: peer.options["config"].get(name) for name in names} for peer in peers}
    assert configs == {
        "fastgen_jax": {"dtype": None, "quantize": None, "token_budget": 256},
        "fastgen_jax dtype=bfloat16": {"dtype": "bfloat16", "quantize": None, "token_budget": 256},
        "fastgen_jax quantize=int8 token_budget=128": {"dtype": None, "quantize": "int8", "token_budget": 128},
    }


def test_another_version_runs_its_own_source(tmp_path) -> None:
    worker = tmp_path / "fastgen_jax/bench/workers/fastgen_worker.py"
    worker.parent.mkdir(parents=True)
    worker.touch()
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    arguments = parser.parse_args(["--model", "m", "--option", "dtype=bfloat16", "--baseline", str(tmp_path)])
    ours, baseline = offline.choose_peers(arguments, [WORKLOAD], threads=2)
    assert baseline.script == worker
    assert baseline.environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert baseline.options == ours.options
