"""The simulator compared with the engine's real loop on a device whose steps take a known time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fastgen_jax import Engine
from fastgen_jax.bench import driver, steps
from fastgen_jax.bench.driver import StepLog, run_load
from fastgen_jax.bench.loads import closed_loop, open_loop
from fastgen_jax.bench.policies import measure
from fastgen_jax.bench.steps import Point, fit
from fastgen_jax.simulation import MeasuredCost, StepShape, load_cost
from fastgen_jax.simulation.validate import errors, simulated_twin
from tests.tiny import tiny_engine

BASE = {8: 0.010, 32: 0.024}  # seconds of a step by its compiled size
PER_ATTENDED = 2e-6
HOST_SECONDS = 0.001


class VirtualTime:
    """Replaces the module `time`: only the device and `sleep` advance the clock, so results do not depend on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@contextmanager
def timed_device(engine: Engine) -> Iterator[None]:
    """Delays results as a device would that runs one step after another, each in a known time."""
    run, commit, clock = engine.runner.run, engine._stepper._commit, VirtualTime()
    ready: list[float] = []

    def timed_run(packed, bucket):
        step = engine.scheduler._steps_in_flight[-1]
        attended = sum(c.length * c.start + c.length * (c.length + 1) // 2 for c in step.chunks)
        clock.now += HOST_SECONDS
        start = max(clock.now, ready[-1] if ready else 0.0)
        ready.append(start + BASE[bucket.num_tokens] + PER_ATTENDED * attended)
        return run(packed, bucket)

    ends = iter(ready)

    def timed_commit(entry):
        clock.now = max(clock.now, next(ends))
        commit(entry)

    vars(engine.runner)["run"], vars(engine._stepper)["_commit"] = timed_run, timed_commit
    driver.time, real = clock, driver.time
    try:
        yield
    finally:
        driver.time = real
        del vars(engine.runner)["run"], vars(engine._stepper)["_commit"]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_simulation_of_an_engine_is_within_ten_percent_of_it(overlap: bool) -> None:
    engine = tiny_engine(overlap=overlap, prefix_caching=False)
    loads = [closed_loop(n, num_requests=10, mean_prompt=40, mean_output=8, warmup=1) for n in (1, 4)]
    with timed_device(engine):
        measured = [measure(engine, load, "splitfuse", "tiny") for load in loads]
    cost = MeasuredCost(
        sizes=(8, 32),
        base=(BASE[8], BASE[32]),
        per_token=(0.0, 0.0),
        per_row=0.0,
        per_decode_attended=PER_ATTENDED,
        per_prompt_attended=PER_ATTENDED,
        host_seconds=HOST_SECONDS,
        facts={},
    )
    simulated = [simulated_twin(record, load, cost) for record, load in zip(measured, loads, strict=True)]
    lines, worst = errors([measured], simulated)
    assert worst <= 0.10, "\n".join(lines)


def test_measured_step_costs_equal_those_of_the_device(tmp_path: Path) -> None:
    engine = tiny_engine(prefix_caching=False)
    with timed_device(engine):
        points = steps.measure(engine, contexts=[8, 40], generated=6, rounds=1)
    model = fit(points, steps.facts_of(engine, "tiny"))
    for size, base in BASE.items():
        step = Point(size=size, num_tokens=size, num_sample_rows=1, decode_attended=0, prompt_attended=0, seconds=0.0)
        assert steps.expected(model, step) == pytest.approx(base, rel=0.05)  # a late plan adds its millisecond
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(model))
    assert load_cost(path).sizes == (8, 32)
    assert any("tokens/s" in line for line in steps.report(points, model))


def test_a_fit_finds_the_coefficients_despite_disturbed_steps() -> None:
    rng = np.random.default_rng(0)
    true = MeasuredCost(
        sizes=(8, 64),
        base=(0.02, 0.03),
        per_token=(0.0, 1e-3),
        per_row=5e-4,
        per_decode_attended=3e-6,
        per_prompt_attended=1e-6,
        host_seconds=0.0,
        facts={},
    )
    points = []
    for i in range(300):
        size = (8, 64)[i % 2]
        tokens = int(rng.integers(1, 9)) if size == 8 else int(rng.integers(9, 65))
        rows, decode, prompt = int(rng.integers(1, 8)), int(rng.integers(0, 4000)), int(rng.integers(0, 20_000))
        seconds = true(StepShape(tokens, rows, decode, prompt, 0)) * (1.8 if i % 10 == 0 else 1.0)
        points.append(
            Point(
                size=size,
                num_tokens=tokens,
                num_sample_rows=rows,
                decode_attended=decode,
                prompt_attended=prompt,
                seconds=seconds,
            )
        )
    facts = {"engine": {"step_sizes": [8, 16, 64]}, "host_seconds": 0.0}
    model = fit(points, facts)
    # The size that never ran gets a line between those of its neighbors, an eighth of the way.
    assert model["base"] == pytest.approx([0.02, 0.02 + 0.01 / 7, 0.03], rel=0.01)
    assert model["per_token"] == pytest.approx([0.0, 1e-3 / 7, 1e-3], rel=0.01, abs=1e-6)
    assert model["facts"]["num_outliers"] == 30
    for name in ("per_row", "per_decode_attended", "per_prompt_attended"):
        assert model[name] == pytest.approx(asdict(true)[name], rel=0.02)
    with pytest.raises(ValueError, match="2 steps were measured, fewer than the 7 unknowns"):
        fit(points[:2], facts)


def test_every_request_of_a_load_is_served_in_full_at_its_time() -> None:
    engine = tiny_engine(prefix_caching=False)
    load = open_loop(200.0, num_requests=6, mean_prompt=20, mean_output=5)
    with StepLog(engine) as log:
        finished, refused, begin = run_load(engine, load)
    assert not refused
    wanted = {r.request_id: (r.num_prompt_tokens, r.max_new_tokens) for r in load.requests}
    assert {r.request_id: (r.num_prompt_tokens, len(r.token_times)) for r in finished} == wanted
    for request, sent in zip(sorted(finished, key=lambda r: r.start), load.requests, strict=True):
        assert request.start - begin == pytest.approx(sent.arrival)
    computed = sum(step.num_tokens for step in log.steps)
    assert computed >= sum(prompt + output - 1 for prompt, output in wanted.values())
    assert "schedule" not in vars(engine.scheduler), "the engine is unchanged"
