"""A pipeline under interrupts, with many threads, destroyed during use, and with direct use of its engine."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fastgen_jax
from fastgen_jax import Engine, EngineConfig, Pipeline, Research
from fastgen_jax.engine.runner import Runner
from tests.api.stress import ENGINE, PipelineStress
from tests.interrupts import Points
from tests.tiny import drain, greedy, tiny_engine, tiny_model, tokens_of

# Python ignores and reports an exception that is raised while an object is destroyed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True}
LONG = OPTIONS | {"max_new_tokens": 100}
REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds: after that it counts as hanging


@pytest.fixture(scope="module")
def shared() -> Iterator[Pipeline]:
    with fastgen_jax.pipeline("sotu-1m", progress=False, **ENGINE) as pipe:
        yield pipe


@pytest.fixture(params=["greedy", pytest.param("sampled", marks=pytest.mark.slow)])
def stress(shared, request) -> PipelineStress:
    return PipelineStress(shared, sampled=request.param == "sampled")


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_engine())


def own_engine() -> Engine:
    """An engine that may be destroyed."""
    params, model = tiny_model()
    sizes = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 64}
    return Engine(params, model, EngineConfig(**sizes))


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """The results of the functions, each run in a thread, all at the same time."""
    results: list[Any] = [None] * len(functions)

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return results


def paused(pipe: Pipeline) -> tuple[threading.Event, threading.Event]:
    """Blocks the thread that steps; returns an event that is set when it is blocked, and one that resumes it."""
    blocked, resume = threading.Event(), threading.Event()
    pipe._shared._running_thread().call(lambda _: (blocked.set(), resume.wait(PATIENCE)))
    return blocked, resume


def test_answers_are_right_after_interrupts_at_random_moments(stress):
    stress.interrupt(10)
    assert not stress.wrong


def test_threads_share_a_pipeline_and_each_answer_is_as_if_alone(stress):
    stress.share(4, 5)
    assert not stress.wrong


@pytest.mark.slow
def test_two_hundred_interrupts_and_four_hundred_uses_in_eight_threads(stress):
    stress.interrupt(200)
    stress.share(8, 50)
    assert not stress.wrong


def test_an_interrupt_at_any_point_of_a_call_leaves_the_pipeline_usable(pipe):
    (expected,) = pipe([5, 6, 7], **OPTIONS)
    points = Points()
    for point in range(1, 500, 17):
        points.left = point
        with suppress(KeyboardInterrupt), points.watched():
            pipe([[5, 6, 7], [8] * 9], **OPTIONS)
        points.left = point
        with suppress(KeyboardInterrupt), points.watched():
            for _ in pipe.stream([9, 10], **OPTIONS):
                pass
        assert pipe([5, 6, 7], **OPTIONS)[0].token_ids == expected.token_ids
    assert points.num_raised > 20


def test_concurrent_streams_and_calls_get_their_own_outputs(pipe):
    alone = [pipe([[5 + i]], **OPTIONS)[0].token_ids for i in range(3)]
    first, second = pipe.stream([5], **OPTIONS), pipe.stream([6], **OPTIONS)
    begun = [next(first).new_token_ids, next(second).new_token_ids]
    assert pipe([7], **OPTIONS)[0].token_ids == alone[2]
    ends = [tuple(t for out in stream for t in out.new_token_ids) for stream in (first, second)]
    assert [a + b for a, b in zip(begun, ends, strict=True)] == alone[:2]


def test_an_unread_stream_blocks_no_other_and_ends_when_it_is_dropped(pipe):
    stream, pairs = pipe.stream([5], **LONG), pipe([[6], [7]], stream=True, **LONG)
    assert len(pipe([8], **LONG)[0].token_ids) == 100
    ids = {*stream._outputs._unfinished, *pairs._unfinished}
    blocked, resume = paused(pipe)
    assert blocked.wait(PATIENCE)
    del stream, pairs
    resume.set()
    pipe([9], **OPTIONS)
    assert not ids & set(pipe.engine.request_ids)


def test_an_error_in_the_loop_over_a_stream_ends_its_request():
    pipe = Pipeline(tiny_engine())

    def read() -> None:
        for output in pipe.stream([5], **LONG):
            _ = len(output.new_token_ids) / 0

    with pytest.raises(ZeroDivisionError):
        read()
    pipe([9], **OPTIONS)
    assert pipe.engine.request_ids == ()


def test_tasks_of_asyncio_share_a_pipeline(pipe):
    alone = [pipe([5 + i], **OPTIONS)[0].token_ids for i in range(6)]

    async def scenario() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(pipe, [5 + i], **OPTIONS) for i in range(6)))

    assert [answer[0].token_ids for answer in asyncio.run(scenario())] == alone


def test_the_engine_may_be_used_during_calls(pipe):
    engine, research = pipe.engine, Research(pipe.engine)
    (alone,) = pipe([5, 6], **LONG)
    whole = research.put(["a"], [[5, 6, 7]])
    research.flush("a")

    def put() -> None:
        for i in range(20):
            np.testing.assert_allclose(research.put([str(i)], [[5, 6, 7]]), whole, rtol=1e-5, atol=1e-5)
            assert research.query(str(i)).num_tokens == 3
            research.flush(str(i))

    def step() -> list[int]:
        ids = [engine.add([7, 8], greedy(30)) for _ in range(2)]
        outputs = drain(engine)
        assert set(outputs) == set(ids)
        assert tokens_of(outputs[ids[0]]) == tokens_of(outputs[ids[1]])
        return tokens_of(outputs[ids[0]])

    calls = [lambda: pipe([5, 6], **LONG)[0].token_ids for _ in range(3)]
    answers = in_threads(put, step, *calls)
    assert answers[0] is None
    assert tuple(answers[1]) == pipe([7, 8], **OPTIONS | {"max_new_tokens": 30})[0].token_ids
    assert answers[2:] == [alone.token_ids] * 3
    engine.scheduler.check_integrity()


def test_a_failed_step_of_the_user_is_reported_to_all_waiting_calls(pipe, monkeypatch):
    blocked, resume = paused(pipe)
    assert blocked.wait(PATIENCE)
    stream = pipe.stream([5], **LONG)
    pipe.engine.add([6], greedy(3))
    monkeypatch.setattr(Runner, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.engine.step()
    monkeypatch.undo()
    resume.set()
    assert len([*stream]) == 100  # it was not in the engine yet
    (failed,) = pipe.engine.step()
    assert "ZeroDivisionError" in str(failed.error)


def test_a_failed_step_is_an_error_of_its_calls_and_later_calls_work(pipe, monkeypatch):
    original, left = Runner.run, iter([True, True, False])
    monkeypatch.setattr(Runner, "run", lambda self, *args: original(self, *args) if next(left, True) else 1 / 0)
    with pytest.raises(RuntimeError, match=r"the step that computed this request failed \(ZeroDivisionError"):
        pipe([5], **LONG)
    assert len(pipe([5], **LONG)[0].token_ids) == 100


def test_a_dead_thread_is_reported_and_replaced(pipe, monkeypatch):
    monkeypatch.setattr(Engine, "recover", lambda *_: 1 / 0)
    monkeypatch.setattr(Runner, "run", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"step that computed this request failed|thread ended because of an error"):
        pipe([5], **LONG)
    monkeypatch.undo()
    assert len(pipe([5], **LONG)[0].token_ids) == 100


def test_a_destroyed_pipeline_is_refused_and_so_is_its_engine():
    engine = own_engine()
    research = Research(engine)
    with Pipeline(engine) as pipe:
        pipe([5], **OPTIONS)
        stream = pipe.stream([5], **LONG)
    for use in (lambda: pipe([5]), lambda: pipe.stream([5]), lambda: pipe.engine, pipe.__enter__):
        with pytest.raises(ValueError, match="this pipeline was destroyed"):
            use()
    with pytest.raises(ValueError, match="destroyed"):
        list(stream)
    pipe.destroy()
    for use in (
        lambda: engine.add([5]),
        engine.step,
        lambda: research.put(["a"], [[5]]),
        lambda: research.query("a"),
        lambda: engine.measure_step(1),
        engine.recover,
    ):
        with pytest.raises(ValueError, match="this engine was destroyed"):
            use()
    assert not engine.has_work


def test_destroying_ends_waiting_calls_with_an_error(monkeypatch):
    pipe = Pipeline(own_engine())
    blocked, resume = paused(pipe)
    assert blocked.wait(PATIENCE)
    streams = [pipe.stream([5], **LONG) for _ in range(3)]
    thread = pipe._shared._running_thread()
    stop = thread.stop
    monkeypatch.setattr(thread, "stop", lambda: (stop(), resume.set()))
    _, *answers = in_threads(pipe.destroy, *[lambda stream=stream: [*stream] for stream in streams])
    assert all(isinstance(error, ValueError) and "destroyed" in str(error) for error in answers)


def test_destroying_the_engine_itself_ends_its_requests_too():
    engine = own_engine()
    pipe = Pipeline(engine)
    request_id = engine.add([5], greedy(90))
    stream = pipe.stream([6], **LONG)
    next(stream)
    engine.destroy()
    with pytest.raises(RuntimeError, match="the engine was destroyed"):
        list(stream)
    outputs = [output for output in engine.step() if output.request_id == request_id]
    assert outputs[-1].finish_reason == "abort"
    assert outputs[-1].error == "the engine was destroyed"
    assert not engine.has_work


def test_destroying_frees_the_memory_despite_other_references():
    pipe = fastgen_jax.pipeline("sotu-1m", progress=False, **ENGINE)
    try:
        pipe(["A word"], max_new_tokens=2)
        raise RuntimeError("as in a notebook, which keeps the traceback and with it everything that its frames refer to")
    except RuntimeError as error:
        kept = (error, pipe.engine, pipe.engine.runner.params, pipe.engine.runner.kv_cache)
    arrays = [x for x in jax.tree.leaves(kept[2:]) if isinstance(x, jax.Array)]
    pipe.destroy()
    assert len(arrays) > 10
    assert all(array.is_deleted() for array in arrays)


def test_destroying_keeps_weights_that_the_user_passed():
    params, _ = tiny_model()
    Pipeline(own_engine()).destroy()
    assert not any(array.is_deleted() for array in jax.tree.leaves(params))


def test_a_pipeline_without_references_releases_its_engine():
    engine = own_engine()
    pipe, gone = Pipeline(engine), weakref.ref(engine)
    stream = pipe.stream([5], **OPTIONS)
    thread = pipe._shared._running_thread()
    del pipe, engine
    assert len([*stream]) == 12  # a reader of a stream keeps the pipeline alive
    del stream
    thread._thread.join(PATIENCE)
    assert not thread.is_alive
    del thread
    gc.collect()
    assert gone() is None


def test_a_program_that_ends_while_a_thread_frees_the_engine_waits_for_it():
    command = [sys.executable, "-W", "error", "-m", "tests.api.programs.ending"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "freed by fastgen-engine\n", "")
