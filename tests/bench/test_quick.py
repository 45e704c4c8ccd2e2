"""`fastgen bench quick`, with a tiny model: the steps it measures, and the roofline that it compares them with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastgen_jax import Engine
from fastgen_jax.bench import machine, quick
from fastgen_jax.cli import main
from fastgen_jax.models.counts import flops_per_token
from tests.serving.checkpoint import write_checkpoint
from tests.tiny import tiny_engine

SECONDS = 0.02  # a few steps of a tiny model
OPTIONS = [
    word
    for option in ("token_budget=16", "budget_ladder=[8]", "max_num_seqs=4", "block_size=4", "num_blocks=64")
    for word in ("--option", option)
]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peaks are measured with small arrays, for a moment."""
    monkeypatch.setattr(machine, "PEAK_SECONDS", 0.01)
    monkeypatch.setattr(machine, "PEAK_SIZE", 64)
    monkeypatch.setattr(machine, "READ_SIZE", 64)


@pytest.mark.usefixtures("short")
def test_one_table_has_prompts_one_stream_and_many_with_the_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    assert main(["bench", "quick", str(checkpoint), "--seconds", str(SECONDS), *OPTIONS]) == 0
    output = capsys.readouterr().out
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| prompts of 16 tokens", "| 1 stream", "| 4 streams"]
    for _, reached, allowed, share, _ in rows:
        numbers = [float(text.replace(",", "")) for text in (reached, allowed)]
        assert min(numbers) > 0
        assert int(share.rstrip("%")) == pytest.approx(100 * numbers[0] / numbers[1], abs=1)
    assert re.search(r"[\d,]+ GFLOP/s, [\d,.]+ GB/s, measured now", output)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(prefix_caching=False)


def test_the_steps_are_those_that_the_rows_name_and_the_engine_is_idle_afterwards(engine: Engine) -> None:
    prompts, one, many = quick.measure(engine, seconds=SECONDS).values()
    assert not engine.has_work
    budget = engine.config.token_budget
    assert all(step.num_tokens <= budget for step in prompts.steps)
    assert sum(step.num_tokens == budget for step in prompts.steps) > len(prompts.steps) / 2
    for run, number in ((one, 1), (many, 256 // quick.SHORTEST)):  # the cache holds 256 tokens
        assert {step.num_tokens for step in run.steps} == {number}
        assert {step.num_sample_rows for step in run.steps} == {number}
    assert engine.scheduler.num_free_blocks == engine.config.num_blocks


def test_the_roofline_is_the_longer_of_arithmetic_and_memory(engine: Engine) -> None:
    run = quick.measure(engine, seconds=SECONDS)["1 stream"]
    arithmetic = quick.rate(engine, run, quick.Peaks(flops_per_s=1e9, bytes_per_s=1e30))
    memory = quick.rate(engine, run, quick.Peaks(flops_per_s=1e30, bytes_per_s=1e9))
    assert (arithmetic.bound, memory.bound) == ("arithmetic", "memory")
    num_steps = len(run.steps) - 1
    assert arithmetic.tokens == memory.tokens == num_steps
    # Each step computes one token with a row of logits, and attends to a growing context.
    one = flops_per_token(engine.model)
    attention = (arithmetic.allowed_seconds * 1e9 - num_steps * one) / (flops_per_token(engine.model, context_len=1) - one)
    assert attention == pytest.approx(sum(step.chunks[0][1] + 1 for step in run.steps[1:]))
    assert memory.allowed_seconds * 1e9 > 4 * num_steps * one / 2  # four bytes for every multiplication


@pytest.mark.usefixtures("short")
def test_both_peaks_are_measured() -> None:
    assert set(machine.memory_peak()) == {"jax", "numpy"}
    assert min(machine.memory_peak().values()) > 0


def test_no_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quick", "--seconds", "0"]) == 2
    assert "--seconds is 0.0; it must be above 0" in capsys.readouterr().err
