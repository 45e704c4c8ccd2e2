"""Programs that are compiled while the engine serves: what it answers meanwhile, and how the thread ends."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, SamplingParams
from fastgen_jax.engine.programs import Program, Programs, StepOutput
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.sampling.sampler import Work
from tests.tiny import drain, greedy, tiny_engine, tiny_model, tokens_of

REPOSITORY = Path(__file__).parents[2]
OPTIONS = {"token_budget": 32, "budget_ladder": (4, 8), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}


def start(**options) -> Engine:
    params, model = tiny_model()
    return Engine(params, model, EngineConfig(**{**OPTIONS, "background_compile": True, **options}))


def answer(engine: Engine, params: SamplingParams | None = None) -> list[int]:
    request_id = engine.add([5, 6, 7], params or greedy(4))
    return tokens_of(drain(engine)[request_id])


class Gate:
    """Holds back the thread that compiles until `open`; `reached` once it has begun."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        self.budgets: list[int] = []

    def open(self) -> None:
        self._opened.set()

    def pass_through(self, budget: int) -> None:
        if threading.current_thread() in compilers():
            self.budgets.append(budget)
            self.reached.set()
            assert self._opened.wait(60)


@pytest.fixture
def gate(monkeypatch):
    gate, compile_program = Gate(), Programs.compile

    def gated(programs: Programs, budget: int, work: Work) -> Program:
        gate.pass_through(budget)
        return compile_program(programs, budget, work)

    monkeypatch.setattr(Programs, "compile", gated)
    yield gate
    gate.open()


def compilers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastgen-compiler"]


def test_an_engine_answers_with_the_largest_program_until_the_others_are_compiled(gate) -> None:
    expected = answer(tiny_engine())
    engine = start()
    assert engine.runner.budgets == (32,)
    assert answer(engine) == expected
    assert engine.metrics.steps_by_budget.keys() == {32}
    gate.open()
    engine.wait_until_compiled()
    assert gate.budgets == [4, 8]
    assert engine.runner.budgets == (4, 8, 32)
    engine.reset_prefix_cache()
    assert answer(engine) == expected
    assert engine.metrics.steps_by_budget.keys() == {4, 32}
    engine.destroy()


def test_programs_are_added_between_two_steps_and_no_step_counts_their_compilation(gate) -> None:
    engine = start()
    request_id = engine.add([5, 6, 7], greedy(40))
    outputs = engine.step() + engine.step()
    gate.open()
    while engine.has_work:
        outputs += engine.step()
        if len(outputs) == 10:
            engine.wait_until_compiled()
    reference = tiny_engine()
    expected_id = reference.add([5, 6, 7], greedy(40))
    assert tokens_of(outputs) == tokens_of(drain(reference)[expected_id])
    assert {output.request_id for output in outputs} == {request_id}
    assert engine.metrics.steps_by_budget.keys() >= {4, 32}
    assert engine.metrics.compiles_while_serving == 0
    engine.destroy()


def test_an_engine_made_from_weights_compiles_everything_first() -> None:
    engine = start(background_compile=None)
    assert engine.runner.budgets == (4, 8, 32)
    assert not compilers()
    engine.destroy()


def test_destroy_waits_for_the_program_that_is_being_compiled_and_drops_it(gate) -> None:
    engine = start()
    assert gate.reached.wait(60)
    threading.Timer(0.05, gate.open).start()
    engine.destroy()
    assert not compilers()
    assert gate.budgets == [4], "the next program was not begun"
    assert engine.runner.budgets == ()
    engine.destroy()


def test_an_engine_that_nobody_holds_is_freed_while_a_program_is_being_compiled(gate) -> None:
    engine = start()
    assert gate.reached.wait(60)
    freed = weakref.ref(engine), weakref.ref(engine.runner)
    (thread,) = compilers()
    del engine
    gc.collect()
    assert [ref() for ref in freed] == [None, None]
    gate.open()
    thread.join(60)
    assert not thread.is_alive()
    assert gate.budgets == [4]


def test_if_a_program_cannot_be_compiled_the_engine_goes_on_and_the_log_says_so(monkeypatch, caplog) -> None:
    compile_program = Programs.compile

    def failing(programs: Programs, budget: int, work: Work) -> Program:
        if budget == 8:
            raise RuntimeError("out of memory")
        return compile_program(programs, budget, work)

    monkeypatch.setattr(Programs, "compile", failing)
    with caplog.at_level(logging.WARNING):
        engine = start()
        engine.wait_until_compiled()
    assert "steps of 8 tokens failed (RuntimeError: out of memory)" in caplog.text
    assert "background_compile=False" in caplog.text
    assert engine.runner.budgets == (4, 32)
    assert answer(engine) == answer(tiny_engine())
    engine.destroy()


def test_a_failure_of_the_first_run_leaves_the_requests_and_the_memory_intact(monkeypatch, gate, caplog) -> None:
    engine = start()
    request_id = engine.add([5, 6, 7], greedy(12))
    outputs = engine.step() + engine.step()

    def lost(runner: Runner, program: Program, *, warm: bool = True) -> None:
        runner._run(program, program.bucket.new_buffer()[0])
        for leaf in (runner.kv_cache.k, runner.state.last_tokens):
            leaf.delete()
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Runner, "add", lost)
    gate.open()
    engine.wait_until_compiled()
    assert "the device is lost" in caplog.text
    outputs += drain(engine)[request_id]
    reference = tiny_engine()
    expected_id = reference.add([5, 6, 7], greedy(12))
    assert tokens_of(outputs) == tokens_of(drain(reference)[expected_id])
    engine.destroy()


def test_a_program_that_is_ready_after_an_interrupt_does_not_repair_the_engine(gate) -> None:
    engine = start()
    engine.add([5, 6, 7], greedy(4))
    engine._journal.is_open, engine._journal.failure = True, "ValueError: a step failed"
    gate.open()
    engine.wait_until_compiled()
    assert engine.runner.budgets == (4, 8, 32)
    assert engine._journal.is_open, "what the user does next decides how the requests end"
    assert len(engine.recover()) == 1
    engine.destroy()


@pytest.mark.slow
def test_two_engines_compile_at_the_same_time() -> None:
    engines = [start(), start(num_blocks=48)]
    answers = [answer(engine) for engine in engines]
    for engine in engines:
        engine.wait_until_compiled()
    assert [answer(engine) for engine in engines] == answers
    assert all(engine.runner.budgets == (4, 8, 32) for engine in engines)
    for engine in engines:
        engine.destroy()


def run(*arguments: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "FASTGEN_CACHE_DIR": ""}
    command = [sys.executable, "-W", "error", "-m", "tests.engine.programs.background", *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_process_ends_after_the_program_that_is_being_compiled() -> None:
    process = run()
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert output.splitlines() == ["compiling 32", "compiling 4", "answered", "compiled 4"]


@pytest.mark.slow
def test_ctrl_c_during_a_compilation_in_the_background_ends_the_process() -> None:
    process = run("forever")
    assert process.stdout is not None
    for line in process.stdout:
        if line == "answered\n":
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert output.splitlines() == ["compiled 4"]


def test_a_program_that_is_ready_while_the_engine_sleeps_is_there_when_it_wakes(gate) -> None:
    engine = start()
    expected = answer(engine)
    engine.release_memory(weights="host")
    gate.open()
    engine.wait_until_compiled()
    assert engine.runner.budgets == (4, 8, 32)
    engine.restore_memory()
    assert answer(engine) == expected
    engine.destroy()


def test_on_a_gpu_each_step_runs_the_narrowest_program_that_suffices(monkeypatch) -> None:
    """On a CPU that is treated as a GPU in this respect."""
    requests = {
        "greedy": SamplingParams(do_sample=False, max_new_tokens=3),
        "sampled": SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_new_tokens=3),
        "any": SamplingParams(temperature=0.8, repetition_penalty=1.2, seed=1, max_new_tokens=3),
    }
    expected = {work: answer(tiny_engine(), params) for work, params in requests.items()}
    monkeypatch.setattr("fastgen_jax.engine.programs.works_on", lambda *_: ("any", "greedy", "sampled"))
    engine, ran, run_program = start(budget_ladder=(), background_compile=False), [], Runner._run

    def recorded(runner: Runner, program: Program, packed: np.ndarray) -> StepOutput:
        ran.append(program.work)
        return run_program(runner, program, packed)

    monkeypatch.setattr(Runner, "_run", recorded)
    for work, params in requests.items():
        ran.clear()
        assert answer(engine, params) == expected[work]
        assert set(ran) == {work}
    engine.destroy()
