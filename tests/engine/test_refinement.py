"""Step sizes that are measured while the engine is idle: what is timed, what is chosen, and that no request notices."""

from __future__ import annotations

import json
import logging
import queue
import threading
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from fastgen_jax import Engine, EngineConfig, Research
from fastgen_jax.api.engine_thread import EngineThread, Event
from fastgen_jax.engine import ladder
from fastgen_jax.engine.ladder import CostModel
from fastgen_jax.engine.refinement import LONGEST_STEP, Refinement
from fastgen_jax.engine.runner import Runner, is_measured
from tests.tiny import drain, greedy, tiny_engine, tiny_model, tokens_of

SIZES = (1, 4, 16, 64, 128, 256, 512)
TIMEOUT = 60  # seconds; a test that reaches it has failed


class FakeRunner:
    """Programs whose steps take `cost(tokens, within=size)` units of `unit` seconds."""

    def __init__(self, sizes: tuple[int, ...], cost: CostModel, *, unit: float = 0.01) -> None:
        self.config: Any = SimpleNamespace(max_num_seqs=64, budget_ladder=sizes)
        self.compiled = {size: self.compile(size) for size in sizes}
        self.programs = self
        self.timed: list[tuple[int, int]] = []
        self._cost, self._unit = cost, unit

    def compile(self, size: int, work: str = "any") -> Any:
        assert work == "any"
        return SimpleNamespace(bucket=SimpleNamespace(num_tokens=size))

    folder = None

    def time_step(self, program: Any, tokens: int) -> float:
        size = program.bucket.num_tokens
        self.timed.append((tokens, size))
        return self._unit * self._cost(tokens, within=size)


def refine(runner: Any, modeled: CostModel) -> tuple[tuple[int, ...], dict[int, float]] | None:
    """What `Refinement` saves after all of its steps."""
    saved: list[Any] = []
    refinement = Refinement(runner, modeled, SIZES, save=lambda chosen, seconds: saved.append((chosen, seconds)))
    while refinement.advance() is not None:
        if refinement._compiler is not None:
            refinement._compiler.wait()
    refinement.close()
    return saved[0] if saved else None


def model(knee: float, *, skips_padding: bool) -> CostModel:
    return CostModel(knee=knee, skips_padding=skips_padding)


@pytest.mark.parametrize("skips_padding", [True, False])
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_a_device_with_another_balance_than_its_data_sheet_gets_the_ladder_of_its_real_one(skips_padding, factor) -> None:
    modeled, real = (model(knee, skips_padding=skips_padding) for knee in (100.0, factor * 100.0))
    runner = FakeRunner(ladder.modeled_ladder(modeled, SIZES, max_num_seqs=64), real)
    expected = ladder.modeled_ladder(real, SIZES, max_num_seqs=64)
    saved = refine(runner, modeled)
    assert saved is not None
    assert saved[0] == expected
    assert saved[1] == pytest.approx({size: 0.01 * real(size, within=size) for size in SIZES}, rel=0.02)
    compiled = {size for _, size in runner.timed}
    assert compiled == {*runner.compiled, *expected}, "only sizes that may be worth it get a program"


def test_steps_of_the_same_size_are_not_timed_one_after_another() -> None:
    cost = model(100.0, skips_padding=True)
    runner = FakeRunner((16, 256), cost, unit=0.1)
    refine(runner, cost)
    assert runner.timed[:12] == 2 * [(1, 16), (4, 16), (16, 16), (64, 256), (128, 256), (256, 256)]


def test_a_step_that_would_take_long_is_estimated_from_shorter_ones() -> None:
    cost = model(100.0, skips_padding=False)
    sizes = ladder.modeled_ladder(cost, SIZES, max_num_seqs=64)
    runner = FakeRunner(sizes, cost, unit=1.2)
    saved = refine(runner, cost)
    assert saved is not None
    assert 1.2 * cost(256, within=256) > LONGEST_STEP > 1.2 * cost(128, within=128)
    assert {size for _, size in runner.timed} == {size for size in sizes if size <= 128} == {16, 64, 128}
    assert saved[1] == pytest.approx({size: 1.2 * cost(size, within=size) for size in SIZES}, rel=0.02)


def test_nothing_is_chosen_on_a_machine_that_other_programs_disturb(caplog, monkeypatch) -> None:
    cost = model(100.0, skips_padding=True)
    runner = FakeRunner((16, 256), cost)
    undisturbed, factors = runner.time_step, cycle(range(10, 30))
    monkeypatch.setattr(runner, "time_step", lambda *step: next(factors) / 10 * undisturbed(*step))
    with caplog.at_level(logging.INFO):
        assert refine(runner, cost) is None
    assert "other programs disturb it" in caplog.text
    assert len(runner.timed) < 1000


def test_a_program_that_cannot_be_compiled_ends_it_and_nothing_is_saved(caplog, monkeypatch) -> None:
    modeled, real = (model(knee, skips_padding=False) for knee in (30.0, 110.0))
    runner = FakeRunner(ladder.modeled_ladder(modeled, SIZES, max_num_seqs=64), real)
    monkeypatch.setattr(runner, "compile", lambda size, work: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert refine(runner, modeled) is None
    assert "ZeroDivisionError" in caplog.text
    assert "step sizes are not measured" in caplog.text


def test_the_fitted_model_is_near_what_was_measured() -> None:
    real = model(40.0, skips_padding=True)
    points = [(1, 16), (16, 16), (64, 256), (256, 256)]
    fitted, unit = model(100.0, skips_padding=True).fitted({p: 0.02 * real(p[0], within=p[1]) for p in points})
    assert fitted.knee == pytest.approx(40.0, rel=0.05)
    assert unit == pytest.approx(0.02, rel=0.05)
    one = model(100.0, skips_padding=True).fitted({(16, 16): 3.0})
    assert one[0].knee == 100.0, "one step says nothing about the knee"
    assert one[1] * one[0](16, within=16) == pytest.approx(3.0)


def test_a_step_is_measured_after_enough_runs_and_enough_time() -> None:
    assert not is_measured([1.0] * 5)
    assert is_measured([1.0] * 6)
    assert not is_measured([1.0, *[0.01] * 20])
    assert is_measured([1.0, *[0.01] * 45])


# An engine


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Engine:
    return start(tmp_path_factory.mktemp("cache"))


def start(folder: Path, **options: Any) -> Engine:
    """An engine whose candidates are 1, 4 and 16 tokens, because larger steps do not fit; its model chooses 16."""
    params, config = tiny_model()
    small = {"max_num_seqs": 4, "block_size": 4, "num_blocks": 4, "compile_cache_dir": str(folder), **options}
    return Engine(params, config, EngineConfig(**small))


@pytest.fixture
def saved() -> list[Any]:
    return []


@pytest.fixture
def engine(shared: Engine, saved: list[Any], monkeypatch) -> Engine:
    """An idle engine of a device on which padding costs time, where one run of each step is enough."""
    monkeypatch.setattr("fastgen_jax.engine.refinement.is_measured", lambda times, **limits: len(times) > 0)
    cost = CostModel(knee=24.0, skips_padding=False)
    shared._refinement = Refinement(
        shared.runner, cost, (1, 4, 16), save=lambda chosen, seconds: saved.append((chosen, seconds))
    )
    return shared


def answer(engine: Engine) -> tuple[list[int], int]:
    """Tokens of a request, and how many of its prompt were cached."""
    request_id = engine.add([5, 6, 7, 8, 9], greedy(3))
    outputs = drain(engine)[request_id]
    return tokens_of(outputs), outputs[-1].num_cached_tokens


def test_refining_changes_no_token_no_cached_prefix_and_no_program(engine, saved, monkeypatch) -> None:
    answer(engine)
    expected, compiled, timed = answer(engine), engine.runner.budgets, []
    assert expected[1] == 4
    assert compiled == engine.config.budget_ladder == (16,)
    seconds, time_step = {4: 0.03, 16: 0.1}, engine.runner.time_step

    def told(program: Any, tokens: int) -> float:
        time_step(program, tokens)
        timed.append(program.bucket.num_tokens)
        return seconds[tokens]

    monkeypatch.setattr(engine.runner, "time_step", told)
    while engine.refine() is not None:
        compiler = engine._refinement._compiler
        if compiler is not None:
            compiler.wait()
        assert answer(engine) == expected
        engine.scheduler.check_integrity()
    assert timed == [16, 4], "1 token is not worth a program, by the model that fits the other two"
    assert [chosen for chosen, _ in saved] == [(4, 16)]
    assert engine.runner.budgets == compiled
    assert engine.metrics.compiles_while_serving == 0
    assert engine.refine() is None


def test_only_an_idle_engine_times_steps(engine, monkeypatch) -> None:
    monkeypatch.setattr(engine.runner, "time_step", lambda *_: pytest.fail("a step was timed"))
    engine.add([5], greedy(1))
    assert engine.refine()
    drain(engine)
    research = Research(engine)
    research.put(["x"], [[5, 6]])
    assert engine.refine()
    research.flush("x")
    engine.release_memory(weights="host")
    assert engine.refine()
    engine.restore_memory()


def test_a_step_that_fails_while_idle_ends_the_refinement_and_no_request(engine, saved, caplog, monkeypatch) -> None:
    expected, _ = answer(engine)

    def lost(runner: Runner, program: Any, tokens: int) -> float:
        runner._run(program, program.bucket.new_buffer()[0])
        for leaf in jax.tree.leaves(runner.kv_cache):
            leaf.delete()
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Runner, "time_step", lost)
    with caplog.at_level(logging.WARNING):
        assert engine.refine() is None
    assert "the device is lost" in caplog.text
    assert answer(engine)[0] == expected
    assert not saved


@pytest.mark.slow  # five engines
def test_the_next_start_uses_what_was_measured(tmp_path, fast_compilation, monkeypatch) -> None:
    monkeypatch.setattr("fastgen_jax.engine.refinement.is_measured", lambda times, **limits: len(times) > 0)
    engine = start(tmp_path)
    while (pause := engine.refine()) is not None:
        threading.Event().wait(pause)
    (known,) = ladder.known(str(tmp_path))
    assert known.seconds.keys() == {1, 4, 16}
    path = tmp_path / ladder.FILE
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({key: {**entry, "ladder": [1, 16]} for key, entry in entries.items()}))
    again = start(tmp_path)
    assert again.config.budget_ladder == (1, 16)
    assert again.refine() is None
    for options in ({"refine_ladder": False}, {"compile_cache_dir": ""}, {"token_budget": 16}):
        assert start(tmp_path / "other", **options).refine() is None


# The thread that drives it


def test_the_thread_times_steps_while_idle_and_takes_a_request_after_the_step_that_is_running(monkeypatch) -> None:
    engine = tiny_engine()
    began, go_on, finished = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def refine() -> float | None:
        calls.append(len(engine.request_ids))
        began.set()
        assert go_on.wait(TIMEOUT)
        if len(calls) == 4:
            finished.set()
            return None
        return 0.0

    monkeypatch.setattr(engine, "refine", refine)
    thread = EngineThread(engine, lambda some: [events.put(event) for event in some], refine_idle=0.0)
    assert began.wait(TIMEOUT)
    thread.submit(engine.intake.request(engine.encode([5, 6]), greedy(3), request_id="during a step"))
    go_on.set()
    outputs: list[Any] = []
    while not (outputs and outputs[-1].finished):
        outputs.append(events.get(timeout=TIMEOUT))
    assert len(tokens_of(outputs)) == 3
    assert finished.wait(TIMEOUT)
    thread.submit(engine.intake.request(engine.encode([5, 6]), greedy(1), request_id="after all"))
    last: Any = None
    while last is None or not last.finished:
        last = events.get(timeout=TIMEOUT)
    thread.close(TIMEOUT)
    assert calls == [0, 0, 0, 0], "no step is timed while there is a request, and none after all were"


def test_the_thread_waits_until_the_engine_was_idle_long_enough(monkeypatch) -> None:
    engine, now = tiny_engine(), [100.0]
    monkeypatch.setattr(engine, "refine", lambda: 7.0)
    thread = EngineThread(engine, lambda events: None, refine_idle=30.0)
    thread.close(TIMEOUT)
    monkeypatch.setattr("fastgen_jax.api.engine_thread.time", SimpleNamespace(monotonic=lambda: now[0]))
    thread._last_work = 90.0
    assert thread._seconds_idle == 20.0
    now[0] = 121.0
    assert thread._seconds_idle == 0.0
    thread._refine_if_idle()
    assert thread._seconds_idle == 7.0
    thread._last_work = 121.0  # a request came
    assert thread._seconds_idle == 30.0
    thread._sleep_idle = 10.0
    assert thread._seconds_idle == 10.0
