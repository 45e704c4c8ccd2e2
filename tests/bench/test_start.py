"""The table of starts, and one real pair of them."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.bench.start import TOTAL, report
from fastgen_jax.cli import main


def test_a_phase_is_shown_as_median_and_range_and_one_that_did_not_run_as_a_dash() -> None:
    cold = [{"import": 1.0, "building": 9.0, TOTAL: 12.0}, {"import": 3.0, TOTAL: 14.0}, {"import": 1.5, TOTAL: 13.0}]
    assert report({"cold": cold, "warm": [{"import": 1.0, TOTAL: 2.5}]}) == [
        "| seconds, median (range) | cold, 3 starts | warm, 1 starts |",
        "|---|---|---|",
        "| import | 1.50 (1.00-3.00) | 1.00 (1.00-1.00) |",
        "| building | 9.00 (9.00-9.00) | - |",
        f"| {TOTAL} | 13.00 (12.00-14.00) | 2.50 (2.50-2.50) |",
    ]


@pytest.mark.slow
def test_a_warm_start_finds_what_the_cold_one_saved(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PALLAS_KERNELS_NATIVE", "0")  # building the kernels takes half a minute
    results = tmp_path / "starts.jsonl"
    options = ["--option", "num_blocks=32", "--option", "token_budget=16", "--option", "budget_ladder=[4]"]
    assert main(["bench", "start", "--model", "sotu-1m", "--rounds", "1", *options, "-o", str(results)]) == 0
    assert f"| {TOTAL} | " in capsys.readouterr().out
    cold, warm = (json.loads(line) for line in results.read_text().splitlines())
    assert (cold["caches"], warm["caches"]) == ("cold", "warm")
    for start in (cold["seconds"], warm["seconds"]):
        parts = sum(seconds for phase, seconds in start.items() if phase not in (TOTAL, "other programs", "CPU seconds"))
        assert parts == pytest.approx(start[TOTAL], rel=0.02)
    assert warm["seconds"]["compiling"] < cold["seconds"]["compiling"]


def test_rounds_must_be_positive(capsys) -> None:
    assert main(["bench", "start", "--rounds", "0"]) != 0
    assert "--rounds is 0; it must be at least 1" in capsys.readouterr().err
