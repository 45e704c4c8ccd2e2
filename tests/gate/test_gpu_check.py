"""The script of `make gpu-check` itself, with tiny shapes: every part runs, and its figures are in one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gate.gpu_engine import gaps_of


@pytest.mark.slow
def test_parts_run_with_tiny_shapes_and_add_their_figures_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    for parts in (["engine", "--deterministic"], ["kernels"], ["products"], ["variants", "--only", "plain"]):
        command = [sys.executable, "-m", "tests.gate.gpu_check", "--tiny", "--json", str(file), "--parts", *parts]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert {*figures} == {"engine", "kernels", "products", "variants"}
    assert len(figures["products"]["differences"]) == 3
    assert all(difference <= 1 for difference in figures["products"]["differences"].values())
    assert figures["variants"]["plain"] <= 1
    assert figures["kernels"]["decode 2 x 64"]["us"] > 0
    engine = figures["engine"]
    assert [step["over_floor"] > 0 for step in engine["steps"]] == [True] * len(engine["steps"])
    assert engine["mixed"]["requests"] == 8
    assert engine["single stream"]["generating_step_ms"] > 0
    assert engine["generating"]["host_ms"] > 0
    assert engine["gaps"] is None  # no GPU
    assert engine["greedy"] == {"requests": 2, "equal": 2, "first_difference": [None, None]}


def test_gaps_are_those_between_kernels_of_all_streams() -> None:
    def event(start: float, length: float, *, pid: int = 1, tid: int = 7) -> dict:
        return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": length, "name": "kernel"}

    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "Stream #8(MemcpyD2H)"}},
        {"ph": "M", "pid": 1, "tid": 9, "name": "thread_name", "args": {"name": "XLA Modules"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        *(event(0, 10), event(11, 9), event(15, 15, tid=8), event(50, 10)),
        *(event(30, 20, tid=9), event(30, 20, pid=2)),  # not of a stream, and not of the device
    ]
    gaps = gaps_of(events)
    assert gaps is not None
    assert gaps["gaps"] == 1  # 30 to 50; one microsecond is none
    assert gaps["largest_gap_us"] == pytest.approx(20)
    assert gaps["busy_share"] == pytest.approx(39 / 60)
    assert gaps_of(event for event in events if event["pid"] == 2) is None
