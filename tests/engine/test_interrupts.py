"""The engine after a KeyboardInterrupt or another exception at any point: no output is lost or repeated."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest

from fastgen_jax import Engine, Research, SamplingParams
from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.text.grammar import Grammar
from tests.interrupts import Points
from tests.serving.tiny_server import engine
from tests.tiny import drain, greedy, tiny_engine, tokens_of

# Python ignores and reports an exception that is raised while a generator is closed or an object is destroyed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LETTERS = Grammar(kind="regex", source="[a-f]{3,12}")
REQUESTS: list[tuple[list[int], SamplingParams, Grammar | None]] = [
    ([5, 6, 7], greedy(12), None),
    ([8] * 33, greedy(9, prompt_logprobs=1), None),
    ([9, 10], greedy(14, repetition_penalty=1.3, logit_bias={40: 3.0}), None),
    ([11] * 7, greedy(12, stop="aa", min_new_tokens=2), None),
    ([12, 13], SamplingParams(max_new_tokens=20, do_sample=False), LETTERS),
    ([14] * 20, greedy(6, logprobs=2), None),
    *[([15 + i, 3, 4], greedy(5 + i), None) for i in range(5)],
]


def add(engine: Engine, number: int) -> str:
    prompt, params, grammar = REQUESTS[number]
    return engine.add(prompt, params, request_id=str(number), grammar=grammar)


def summary(outputs: list[RequestOutput]) -> dict[str, Any]:
    """The combined outputs of a request; checks that they are consistent."""
    counts = np.cumsum([len(o.new_token_ids) for o in outputs])
    assert [o.num_generated_tokens for o in outputs] == counts.tolist(), "an output is missing or came twice"
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    prompt_logprobs = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    return {
        "tokens": tokens_of(outputs),
        "text": "".join(o.text for o in outputs),
        "why": outputs[-1].finish_reason,
        "logprobs": [p.token_id for o in outputs for p in o.logprobs or ()],
        "prompt": [[p.token_id for p in given] for given in prompt_logprobs],
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """The result of each request alone."""
    alone = {}
    for number in range(len(REQUESTS)):
        request_id = add(engine(), number)
        alone[request_id] = summary(drain(engine())[request_id])
    return alone


def insist(operation: Callable[[], Any], points: Points, gap: Callable[[], int]) -> Any:
    """The result of an operation that is repeated until no interrupt comes."""
    while True:
        try:
            with points.watched():
                return operation()
        except KeyboardInterrupt:
            points.left = gap()


@pytest.mark.parametrize("seed", range(6))
def test_requests_return_the_same_after_interrupts_at_any_point(expected, seed):
    shared, points, draw = engine(), Points(), random.Random(seed)

    def gap() -> int:  # a step has about 300 points, compiling a grammar has thousands: the test must end
        return draw.randint(1, 600) if draw.random() < 0.9 else 5000

    points.left = gap()
    outputs: dict[str, list[RequestOutput]] = {}
    for number in draw.sample(range(len(REQUESTS)), len(REQUESTS)):
        insist(partial(add, shared, number), points, gap)
    while shared.has_work:
        for output in insist(shared.step, points, gap):
            outputs.setdefault(output.request_id, []).append(output)
    assert points.num_raised > 2
    assert {request_id: summary(outputs[request_id]) for request_id in outputs} == expected
    shared.scheduler.check_integrity()
    assert shared.scheduler.num_free_blocks == shared.config.num_blocks


def test_each_point_of_a_step_may_be_interrupted(expected):
    shared, points = engine(), Points()
    add(shared, 0), add(shared, 9), shared.step(), shared.step()
    points.left = 10**9
    with points.watched():
        first = shared.step()
    num_points = 10**9 - points.left
    assert first
    drain(shared)
    for point in range(1, num_points + 3, 4):
        add(shared, 0), add(shared, 9), add(shared, 4)
        outputs: dict[str, list[RequestOutput]] = {}
        points.left = 10**9
        for number in range(4):
            if number == 2:
                points.left = point
            with suppress(KeyboardInterrupt), points.watched():
                for output in shared.step():
                    outputs.setdefault(output.request_id, []).append(output)
        for request_id, rest in drain(shared).items():
            outputs.setdefault(request_id, []).extend(rest)
        assert {i: summary(outputs[i]) for i in outputs} == {i: expected[i] for i in ("0", "9", "4")}, point


def test_an_interrupted_abort_or_add_leaves_no_partial_request():
    shared, points = engine(), Points()
    for point in range(1, 60, 2):
        keep, drop = add(shared, 0), add(shared, 1)
        shared.step()
        points.left = point
        with suppress(KeyboardInterrupt), points.watched():
            shared.abort(drop)
        with suppress(KeyboardInterrupt), points.watched():
            add(shared, 2)
        points.left = 0
        shared.abort(drop)
        assert set(shared.request_ids) in ({keep}, {keep, "2"})
        assert set(drain(shared)) - {drop} <= {keep, "2"}
        shared.scheduler.check_integrity()
        assert shared.scheduler.num_free_blocks == shared.config.num_blocks


def test_sequences_of_put_survive_interrupts_of_steps_and_of_put():
    shared, points = tiny_engine(), Points()
    research = Research(shared)
    whole = research.put(["whole"], [[5, 6, 7, 8, 9]])
    research.flush("whole")
    for point in range(1, 400, 13):
        research.put(["kept", "other"], [[5, 6], [7] * 40])
        before = research.query("kept").num_tokens
        shared.add([5, 6], greedy(6))
        points.left = point
        with suppress(KeyboardInterrupt), points.watched():
            shared.step()
            research.put(["kept", "new"], [[7], [5]])
        done = research.query("kept").num_tokens - before
        assert done == research.query("new").num_tokens in (0, 1)
        tokens = [7, 8, 9][done:]
        np.testing.assert_allclose(research.put(["kept"], [tokens]), whole, rtol=1e-5, atol=1e-5)
        drain(shared)
        for uid in ("kept", "other", *["new"] * done):
            research.flush(uid)
        assert shared.scheduler.num_free_blocks == shared.config.num_blocks


def test_after_a_failed_step_its_requests_report_the_error_and_others_continue(expected, monkeypatch):
    shared = engine()
    for number in range(len(REQUESTS)):
        add(shared, number)
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(3):
        for output in shared.step():
            outputs.setdefault(output.request_id, []).append(output)
    monkeypatch.setattr(type(shared.runner), "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared.step()
    monkeypatch.undo()
    for request_id, rest in drain(shared).items():  # recover was not called
        outputs.setdefault(request_id, []).extend(rest)
    failed = {i for i, rest in outputs.items() if rest[-1].error is not None}
    assert 0 < len(failed) <= shared.config.max_num_seqs
    assert all("failed (ZeroDivisionError: division by zero)" in str(outputs[i][-1].error) for i in failed)
    assert all(outputs[i][-1].finish_reason == "abort" for i in failed)
    assert {i: summary(outputs[i]) for i in outputs if i not in failed} == {
        i: given for i, given in expected.items() if i not in failed
    }


def test_an_interrupted_engine_keeps_its_device_memory_unless_a_program_took_it():
    shared = tiny_engine()
    cache = shared.runner.kv_cache
    shared._journal.is_open = True
    shared.step()
    assert shared.runner.kv_cache is cache
    program, bucket = shared.runner._compiled[8][1], shared.runner._compiled[8][0]
    program(shared.runner.params, cache, shared.runner.state, bucket.new_buffer()[0])  # the result is lost
    shared._journal.is_open = True
    request_id = shared.add([5, 6, 7], greedy(5))
    assert len(tokens_of(drain(shared)[request_id])) == 5
