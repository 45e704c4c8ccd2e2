from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fastgen_jax.bench import compare, figures
from fastgen_jax.bench.curves import curves
from fastgen_jax.bench.engine_runs import engine_tables, read_engine_runs
from fastgen_jax.bench.loads import closed_loop
from fastgen_jax.bench.metrics import RequestTimes, Summary
from fastgen_jax.bench.report import Page
from fastgen_jax.bench.results import RunRecord, append, read
from fastgen_jax.bench.tables import comparison
from fastgen_jax.cli import main

PROGRAMS = Path(__file__).parent / "programs"


def run_of(label: str, clients: int, *, gap: float, count: int = 6) -> RunRecord:
    """Requests of 512 prompt tokens; each gets five tokens, the first after 0.5 s, then one every `gap` seconds."""
    requests = tuple(
        RequestTimes(
            request_id=f"r{i}", num_prompt_tokens=512, start=float(i), token_times=tuple(i + 0.5 + gap * k for k in range(5))
        )
        for i in range(count)
    )
    load = closed_loop(clients, num_requests=count, mean_prompt=512, mean_output=5)
    return RunRecord(
        label=label,
        source="measured",
        load=load.facts,
        requests=requests,
        context={"command": f"run <{label}>"},
        steps=((0.0, 0.5, 512, (("r0", 0, 512),)), (0.5, 0.5 + gap, 1, (("r0", 512, 1),))),
    )


RUNS = [run_of("quick", 1, gap=0.1), run_of("quick", 4, gap=0.2), run_of("slow", 1, gap=0.3), run_of("slow", 4, gap=0.6)]


def test_runs_are_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, RUNS[:2])
    with path.open("a") as file:
        file.write('{"engine": "a line of another benchmark"}\n')
    append(path, RUNS[2:])
    found = read(path)
    assert [(r.label, r.num_clients, r.workload) for r in found] == [
        ("quick", 1, "512/5"),
        ("quick", 4, "512/5"),
        ("slow", 1, "512/5"),
        ("slow", 4, "512/5"),
    ]
    assert found[0].steps == RUNS[0].steps
    for before, after in zip(RUNS, found, strict=True):
        for a, b in zip(before.requests, after.requests, strict=True):
            assert b.token_times == pytest.approx(a.token_times, abs=1e-6)


def test_a_file_without_runs_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="contains no runs"):
        read(path)
    with pytest.raises(ValueError, match="contains no runs"):
        read(tmp_path / "missing.jsonl")


def test_curves_interpolate_but_do_not_extrapolate() -> None:
    quick, slow = curves(RUNS)
    # Latencies of 0.9 and 1.3 s with 1 and 4 clients.
    assert [s.throughput for s in quick.summaries] == pytest.approx([1 / 0.9, 4 / 1.3])
    assert quick.latency_at((1 / 0.9 + 4 / 1.3) / 2) == pytest.approx(1.1)
    assert quick.throughput_at(1.5) is None
    assert slow.effective(3.0) == pytest.approx([6 / 6.7, 0.0])  # gaps of 0.3 s meet 3 tokens/s, gaps of 0.6 s do not
    with pytest.raises(ValueError, match="slow has no run with 2 clients, only with 1, 4"):
        slow.summary(2)


def test_a_comparison_shows_how_many_times_better_ours_is() -> None:
    rows = {row[0]: row[3] for row in comparison(*curves(RUNS), 512.0, [3.0, 4.0])}
    assert rows["effective throughput at 3 tokens/s"] == f"{(6 / 5.9) / (6 / 6.7):.2f}"
    assert rows["effective throughput at 4 tokens/s"] == "-", "the rival never meets it"
    assert rows["P95 token latency, 4 clients"] == "3.00"


def test_a_report_is_one_page_with_figures_and_commands(tmp_path: Path, capsys) -> None:
    append(tmp_path / "quick.jsonl", RUNS[:2])
    append(tmp_path / "slow.jsonl", RUNS[2:])
    costs = {
        "sizes": [8, 64],
        "base": [0.01, 0.05],
        "per_token": [0.0, 1e-4],
        "per_row": 0.0,
        "per_decode_attended": 0.0,
        "per_prompt_attended": 1e-6,
        "facts": {"model": "m", "engine": {"dtype": "float32"}},
    }
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    argv = [
        "bench",
        "report",
        str(tmp_path / "quick.jsonl"),
        str(tmp_path / "slow.jsonl"),
        "--costs",
        str(tmp_path / "costs.json"),
        "--generation-rates",
        "3",
    ]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "6 figures from 4 runs" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {
        "throughput-latency-512-5.png",
        "effective-3-512-5.png",
        "token-latency-512-5.png",
        "steps-0.png",
        "steps-1.png",
        "step-costs.png",
    }
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "run &lt;quick&gt;" in page
    assert "http" not in page.replace("http-equiv", ""), "the page loads nothing from the network"
    again = Page(tmp_path)
    again.figure("step-costs", figures.step_costs([costs]))
    assert (tmp_path / "step-costs.png").read_bytes() == (tmp_path / "out" / "step-costs.png").read_bytes()


def engine_line(engine: str, workload: str, rate: float) -> str:
    summary = dict.fromkeys(Summary.__dataclass_fields__, 1.0) | {"total_rate": rate, "token_latency_p95": None}
    return json.dumps({"engine": engine, "workload": workload, "command": f"compare {engine}", **summary}) + "\n"


def test_a_report_compares_engines_from_several_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "monday.jsonl").write_text(
        engine_line("ours", "W1", 300.0)
        + engine_line("ours", "W1", 310.0)
        + engine_line("ours", "W1", 500.0)
        + engine_line("rival", "W1", 200.0)
    )
    (tmp_path / "friday.jsonl").write_text(engine_line("rival", "W1", 620.0) + engine_line("rival", "W3", 7.0))
    files = [tmp_path / "monday.jsonl", tmp_path / "friday.jsonl"]
    lines = engine_tables(read_engine_runs(files))
    assert "| ours (monday) | 3 | 310 | 300-500 | 1.0 | 1.00 | 1000.0 | - | 1.00 |" in lines
    assert "| rival (monday) | 1 | 200 | 200-200 | 1.0 | 1.00 | 1000.0 | - | 1.55 |" in lines
    assert "| rival (friday) | 1 | 620 | 620-620 | 1.0 | 1.00 | 1000.0 | - | 0.50 |" in lines
    assert main(["bench", "report", *map(str, files), "--out", str(tmp_path / "out")]) == 0
    assert "0 figures from 6 runs" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<td>ours (monday)</td>" in page
    assert "compare rival" in page
    with pytest.raises(ValueError, match="contains no runs"):
        read_engine_runs([tmp_path / "missing.jsonl"])


def test_installed_engines_are_found_and_the_others_are_skipped_with_a_reason(tmp_path: Path, monkeypatch) -> None:
    python = str(PROGRAMS / "python_with_vllm")
    server = tmp_path / "llama-server"
    server.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    arguments = parser.parse_args(["--hf-model", "folder"])
    lines = compare.find(arguments, [python])
    assert arguments.vllm_python == python
    assert arguments.hf_python is None
    assert any("transformers: not found" in line for line in lines)
    assert "fastgen_jax: skipped, it needs --model" in lines
    assert any("llama-server: skipped, it needs --gguf" in line for line in lines)
    assert arguments.llama_server is None
    with pytest.raises(ValueError, match="--python /no/where does not exist"):
        compare.installed("/no/where")


def test_the_packages_of_a_python_are_found() -> None:
    have = compare.installed(sys.executable)
    assert have == {name for name in ("vllm", "transformers", "torch") if importlib.util.find_spec(name)}
