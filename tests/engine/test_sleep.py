"""An engine that gives its memory back and takes it again."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, Research
from fastgen_jax.api.engine_thread import EngineThread, Event, Failure
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.metrics import compile_count
from tests.interrupts import Points
from tests.serving.checkpoint import write_checkpoint
from tests.tiny import drain, greedy, tiny_model, tokens_of

SETTINGS = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
PROMPTS = [[5 + i, 6, 7 + i, *range(3, 3 + 5 * i)] for i in range(8)]
TIMEOUT = 120  # seconds; a test that reaches it has failed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Engine:
    engine = Engine.from_pretrained(checkpoint, **SETTINGS)
    engine.wait_until_compiled()
    return engine


@pytest.fixture(scope="module")
def expected(shared: Engine) -> list[list[int]]:
    return [answer(shared, prompt) for prompt in PROMPTS]


@pytest.fixture
def engine(shared: Engine, expected: list[list[int]]):
    """An engine of a checkpoint, awake and idle."""
    shared.restore_memory()
    yield shared
    assert not shared.has_work
    shared.scheduler.check_integrity()


def answer(engine: Engine, prompt: list[int], num_tokens: int = 12) -> list[int]:
    request_id = engine.add(prompt, greedy(num_tokens))
    return tokens_of(drain(engine)[request_id])


def in_memory() -> Engine:
    params, model = tiny_model()
    return Engine(params, model, EngineConfig(**SETTINGS))


@pytest.mark.parametrize("weights", ["device", "dropped", "host", None])
def test_memory_is_given_back_and_a_request_takes_it_again(engine: Engine, expected, weights) -> None:
    runner, compiles, wakes = engine.runner, compile_count(), engine.metrics.wakes
    cache = jax.tree.leaves((runner.kv_cache, runner.state))
    arrays = jax.tree.leaves(engine.params)
    engine.release_memory(weights=weights)
    assert engine.is_asleep
    assert all(array.is_deleted() for array in cache)
    assert all(array.is_deleted() for array in arrays) == (weights in ("dropped", None))
    assert not jax.tree.leaves(runner.params)
    del arrays
    assert answer(engine, PROMPTS[3]) == expected[3]
    assert not engine.is_asleep
    assert engine.metrics.wakes == wakes + 1
    assert compile_count() == compiles, "the programs must stay"
    assert engine.metrics.compiles_while_serving == 0


def test_sleeping_and_waking_twice_changes_nothing(engine: Engine, expected) -> None:
    engine.restore_memory()
    for weights in ("host", "device", "dropped"):
        engine.release_memory(weights=weights)
    for _ in range(2):
        engine.restore_memory()
    assert answer(engine, PROMPTS[0]) == expected[0]


def test_cached_prefixes_are_lost(engine: Engine, expected) -> None:
    prompt = [7] * 40

    def num_cached() -> int:
        request_id = engine.add(prompt, greedy(1))
        return drain(engine)[request_id][-1].num_cached_tokens

    num_cached()
    assert num_cached() > 0
    engine.release_memory(weights="dropped")
    assert num_cached() == 0
    assert num_cached() > 0


def test_an_engine_with_work_does_not_sleep(engine: Engine) -> None:
    engine.add(PROMPTS[0], greedy(3))
    with pytest.raises(ValueError, match=r"1 requests; memory can be released only while it is idle or paused"):
        engine.release_memory(weights="dropped")
    drain(engine)
    research = Research(engine)
    research.put(["x"], [[5, 6, 7]])
    with pytest.raises(ValueError, match=r"1 sequences .* memory can be released only without them"):
        engine.release_memory(weights="dropped")
    research.flush("x")
    engine.release_memory(weights="dropped")
    logits = research.put(["x"], [[5, 6, 7]])  # wakes it
    assert np.isfinite(logits).all()
    research.flush("x")


def test_weights_in_memory_are_kept_or_given_again(expected, monkeypatch) -> None:
    engine = in_memory()
    engine.release_memory(weights="host")
    assert answer(engine, PROMPTS[1]) == expected[1]
    engine.release_memory(weights=None)  # they cannot be read again
    assert answer(engine, PROMPTS[1]) == expected[1]
    with monkeypatch.context() as patch:  # an accelerator's weights move to the host
        patch.setattr(jax, "default_backend", lambda: "tpu")
        engine.release_memory(weights="host")
    assert answer(engine, PROMPTS[1]) == expected[1]
    engine.release_memory(weights="dropped")
    with pytest.raises(ValueError, match=r"asleep; call engine\.restore_memory"):
        _ = engine.params
    for attempt in (engine.restore_memory, lambda: engine.add(PROMPTS[1], greedy(2)), lambda: engine.measure_step(8)):
        with pytest.raises(ValueError, match=r"engine\.restore_memory\(params\).*weights='host'"):
            attempt()
    assert engine.is_asleep
    assert not engine.has_work
    engine.reset_prefix_cache()  # needs no memory
    assert engine.is_asleep
    params, _ = tiny_model()
    with pytest.raises(ValueError, match=r"params\['embed'\] has shape"):
        engine.restore_memory({**params, "embed": params["embed"][1:]})
    engine.restore_memory(params)
    assert answer(engine, PROMPTS[1]) == expected[1], "weights of the caller must not be deleted"
    with pytest.raises(ValueError, match=r"has its memory; call engine\.update_params"):
        engine.restore_memory(params)
    engine.release_memory(weights="dropped")
    engine.update_params(params)
    assert not engine.is_asleep
    assert answer(engine, PROMPTS[1]) == expected[1]
    engine.release_memory(weights="host")
    engine.destroy()
    for use in (engine.restore_memory, lambda: engine.add(PROMPTS[0])):
        with pytest.raises(ValueError, match="destroyed"):
            use()


def test_replaced_weights_are_never_exchanged_for_those_of_the_checkpoint(checkpoint: Path, expected) -> None:
    engine = Engine.from_pretrained(checkpoint, **SETTINGS)
    engine.release_memory(weights="dropped")
    engine.wait_until_compiled()  # programs that are ready while it sleeps do not wake it
    assert engine.is_asleep
    assert engine.runner.budgets == engine.config.budget_ladder
    assert answer(engine, PROMPTS[2]) == expected[2]
    params, _ = tiny_model()
    other = {**params, "final_norm": params["final_norm"] * jax.random.normal(jax.random.key(0), params["final_norm"].shape)}
    engine.update_params(other)
    changed = answer(engine, PROMPTS[2])
    assert changed != expected[2]
    engine.release_memory(weights=None)
    assert answer(engine, PROMPTS[2]) == changed
    engine.release_memory(weights="dropped")
    with pytest.raises(ValueError, match="not those of a checkpoint"):
        engine.add(PROMPTS[2], greedy(2))
    engine.restore_memory(other)
    assert answer(engine, PROMPTS[2]) == changed


def test_a_missing_checkpoint_is_an_error_until_it_is_back(engine: Engine, checkpoint: Path, expected, tmp_path) -> None:
    engine.release_memory(weights="dropped")
    moved = checkpoint.rename(tmp_path / "moved")
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"asleep and cannot read its weights again .*; restore the checkpoint"):
                engine.add(PROMPTS[4], greedy(2))
            assert engine.is_asleep
            assert not engine.has_work
        write_checkpoint(checkpoint)
        config = checkpoint / "config.json"
        text = config.read_text()
        config.write_text(text.replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
        assert config.read_text() != text
        with pytest.raises(ValueError, match="holds another model than this engine"):
            engine.restore_memory()
        config.write_text(text)
        assert answer(engine, PROMPTS[4]) == expected[4]
    finally:
        if not checkpoint.exists():
            moved.rename(checkpoint)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from destructors
@pytest.mark.parametrize("weights", ["dropped", "host"])
def test_an_interrupt_while_falling_asleep_or_waking_loses_nothing(engine: Engine, expected, weights) -> None:
    points = Points()

    def interrupted(operation, at: int) -> None:
        points.left = at
        try:
            with points.watched():
                operation()
        except KeyboardInterrupt:
            pass

    def points_of(operation) -> int:
        interrupted(operation, 10**9)
        return 10**9 - points.left

    def fall_asleep() -> None:
        engine.release_memory(weights=weights)

    asleep, awake = points_of(fall_asleep), points_of(engine.restore_memory)
    raised = points.num_raised
    for part in range(8):
        engine.restore_memory()
        interrupted(fall_asleep, 1 + part * asleep // 8)
        assert answer(engine, PROMPTS[part]) == expected[part], f"after an interrupt in part {part} of falling asleep"
        fall_asleep()
        interrupted(engine.restore_memory, 1 + part * awake // 8)
        assert answer(engine, PROMPTS[part]) == expected[part], f"after an interrupt in part {part} of waking"
    assert points.num_raised >= raised + 12, "most of the interrupts must have happened"


def test_requests_of_eight_threads_survive_an_engine_that_falls_asleep_whenever_it_can(engine: Engine, expected) -> None:
    boxes: dict[str, queue.SimpleQueue[Event]] = {}
    fell_asleep = threading.Condition()

    def deliver(events: Sequence[Event]) -> None:
        for event in events:
            boxes[event.request_id].put(event)
        with fell_asleep:
            fell_asleep.notify_all()

    sleeps = engine.metrics.sleeps
    problems: list[BaseException] = []
    thread = EngineThread(engine, deliver, sleep_idle=1e-3)

    def client(number: int) -> None:
        try:
            for round_ in range(6):
                request_id = f"{number}-{round_}"
                boxes[request_id] = box = queue.SimpleQueue()
                thread.submit(engine.intake.request(tuple(PROMPTS[number]), greedy(12), request_id=request_id))
                events: list[Any] = []
                while not (events and events[-1].finished):
                    events.append(box.get(timeout=TIMEOUT))
                    assert not isinstance(events[-1], Failure), events[-1]
                assert tokens_of(events) == expected[number], request_id
                if round_ % 2:  # the next request comes when all are done and the engine sleeps
                    together.wait(TIMEOUT)
                    with fell_asleep:
                        assert fell_asleep.wait_for(lambda: thread.load.is_asleep, TIMEOUT)
                    together.wait(TIMEOUT)
        except BaseException as error:
            problems.append(error)
            together.abort()

    together = threading.Barrier(len(PROMPTS))
    clients = [threading.Thread(target=client, args=(number,)) for number in range(len(PROMPTS))]
    for one in clients:
        one.start()
    for one in clients:
        one.join(TIMEOUT)
    thread.close(TIMEOUT)
    assert not problems
    assert engine.metrics.sleeps - sleeps >= 3
    assert engine.metrics.compiles_while_serving == 0


def test_a_request_that_cannot_wake_the_engine_fails_and_the_next_one_tries_again(
    engine: Engine, checkpoint: Path, expected, tmp_path
) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    thread = EngineThread(engine, lambda some: [events.put(event) for event in some])
    engine.release_memory(weights="dropped")
    moved = checkpoint.rename(tmp_path / "moved")
    try:
        thread.submit(engine.intake.request(tuple(PROMPTS[5]), greedy(12), request_id="first"))
        failure = events.get(timeout=TIMEOUT)
        assert isinstance(failure, Failure)
        assert "cannot read its weights again" in failure.message
    finally:
        moved.rename(checkpoint)
    thread.submit(engine.intake.request(tuple(PROMPTS[5]), greedy(12), request_id="second"))
    outputs: list[Any] = []
    while not (outputs and outputs[-1].finished):
        outputs.append(events.get(timeout=TIMEOUT))
    assert tokens_of(outputs) == expected[5]
    thread.close(TIMEOUT)


@pytest.mark.slow  # a real model, in a process whose memory is measured
def test_the_memory_really_goes_back_to_the_system() -> None:
    command = [sys.executable, "-m", "tests.engine.programs.asleep"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout
    measured = json.loads(told.splitlines()[-1])
    assert measured["same"]
    assert measured["awake"] - measured["asleep"] > 0.8 * measured["held"]
    assert measured["again"] < 1.1 * measured["awake"]
