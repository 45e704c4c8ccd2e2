"""Weights, pauses and scores through the asynchronous engine and the pipeline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from fastgen_jax import AsyncEngine, ClosedError, Pipeline, RequestFailedError, SamplingParams
from fastgen_jax.engine.weights import prepare_params
from tests.tiny import drain, greedy, random_params, tiny_engine, tiny_model, tokens_of

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def engine():
    engine = tiny_engine()
    old, new = (prepare_params(p, engine.model, engine.config) for p in (tiny_model()[0], random_params(engine.model)))
    engine.update_params(old, version=0)
    engine.new = new  # pyright: ignore[reportAttributeAccessIssue]
    yield engine
    assert not engine.request_ids
    assert not engine.is_paused
    assert not engine.wakers
    engine.update_params(old, version=0)


def running(engine: Any, scenario: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def run() -> None:
        async with AsyncEngine(engine) as backend:
            await scenario(backend)

    asyncio.run(asyncio.wait_for(run(), 120))


async def generate(backend: AsyncEngine, num_tokens: int, started: asyncio.Event | None = None) -> list:
    outputs = []
    async for output in backend.generate(PROMPT, greedy(num_tokens)):
        outputs.append(output)
        if started is not None:
            started.set()
    return outputs


def test_streams_survive_pauses_and_updates(engine):
    request_id = engine.add(PROMPT, greedy(100))
    expected = tokens_of(drain(engine)[request_id])

    async def scenario(backend: AsyncEngine) -> None:
        for mode in ("keep", "wait"):
            started = asyncio.Event()
            task = asyncio.create_task(generate(backend, 100, started))
            await started.wait()
            await backend.pause(mode)
            if mode == "wait":
                await task
            late = asyncio.create_task(generate(backend, 5))
            if mode == "keep":
                await backend.release_memory()
                await backend.restore_memory()
            await backend.resume()
            assert tokens_of(await task) == expected
            assert tokens_of(await late) == expected[:5]
        started = asyncio.Event()
        task = asyncio.create_task(generate(backend, 100, started))
        await started.wait()
        assert await backend.update_params(engine.new, version=9) == 9
        outputs = await task
        versions = [output.weight_version for output in outputs]
        assert versions == sorted(versions)
        assert {*versions} <= {0, 9}
        assert len(outputs) == 100

    running(engine, scenario)


def test_streams_end_with_a_pause_that_aborts(engine):
    async def scenario(backend: AsyncEngine) -> None:
        started = asyncio.Event()
        task = asyncio.create_task(generate(backend, 120, started))
        await started.wait()
        await backend.pause("abort")
        outputs = await task
        assert outputs[-1].finish_reason in ("abort", "length")
        await backend.resume()

    running(engine, scenario)


def test_a_deadline_passes_during_a_pause(engine):
    async def scenario(backend: AsyncEngine) -> None:
        await backend.pause()
        request = backend.intake.request(backend.intake.encode(PROMPT), greedy(5))
        with pytest.raises(RequestFailedError, match="deadline"):
            async for _ in backend.submit(request, deadline=time.monotonic() + 0.05):
                pass
        await backend.resume()

    running(engine, scenario)


def test_scores_beside_streams_are_those_of_the_engine(engine):
    rng = np.random.default_rng(1)
    tokens = [rng.integers(3, 96, n).tolist() for n in (30, 2, 17)]
    params = SamplingParams(temperature=0.6, top_p=0.8)
    expected = engine.score(tokens, params, start=[5, 1, 16])

    async def scenario(backend: AsyncEngine) -> None:
        task = asyncio.create_task(generate(backend, 50))
        scores = await backend.score(tokens, params, start=[5, 1, 16])
        for score, wanted in zip(scores, expected, strict=True):
            np.testing.assert_array_equal(score.processed_logprobs, wanted.processed_logprobs)
            np.testing.assert_array_equal(score.logprobs, wanted.logprobs)
        await task
        with pytest.raises(ValueError, match=r"tokens\[0\] has 1 token"):
            await backend.score([[5]])

    running(engine, scenario)


def test_an_engine_whose_thread_has_ended_says_so(engine):
    backend = []

    async def scenario(open_backend: AsyncEngine) -> None:
        backend.append(open_backend)

    running(engine, scenario)
    with pytest.raises(ClosedError):
        asyncio.run(backend[0].pause())


def test_the_engine_of_a_pipeline_is_paused_and_updated_from_another_thread_than_the_call(engine):
    pipe, answers = Pipeline(engine), []
    pipe(PROMPT, greedy(2))
    first = threading.Event()

    def call() -> None:
        for output in pipe.stream(PROMPT, greedy(100)):
            answers.append(output)
            first.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert first.wait(60)
    engine.pause()
    engine.update_params(engine.new, version=3)
    engine.resume()
    thread.join(60)
    assert not thread.is_alive()
    assert len(answers) == 100
    (response,) = pipe(PROMPT, greedy(4))
    assert response.weight_versions == ((3, 4),)
    assert pipe._shared._thread is not None
    pipe._shared._thread.close()
