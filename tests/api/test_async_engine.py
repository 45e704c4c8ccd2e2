"""The engine for asyncio: effects of one request on others, and behavior after errors."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fastgen_jax import Engine, SamplingParams
from fastgen_jax.api.async_engine import AsyncEngine, ClosedError, QueueFullError, RequestFailedError
from fastgen_jax.api.engine_thread import EngineThread
from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.stepper import Stepper
from fastgen_jax.serving.errors import as_api_error
from tests.tiny import drain, greedy, pause_after_outputs, tiny_engine, tokens_of


def run(scenario, *, engine=None, **options):
    """Runs `scenario(async_engine)` on a tiny engine, and checks that nothing is left behind."""
    engine = engine or tiny_engine()

    async def inside():
        async with AsyncEngine(engine, **options) as wrapped:
            result = await asyncio.wait_for(scenario(wrapped), 120)
            await wrapped.call(lambda e: e.scheduler.check_integrity())
        return result

    try:
        return asyncio.run(inside())
    finally:
        for request_id in engine.request_ids:
            engine.abort(request_id)
        drain(engine)
        assert engine.scheduler.num_free_blocks == engine.config.num_blocks
        assert engine.metrics.compiles_while_serving == 0


async def tokens(engine: AsyncEngine, prompt, params=None, **options) -> list[int]:
    return [t async for out in engine.generate(prompt, params or greedy(8), **options) for t in out.new_token_ids]


async def rest(stream) -> list:
    return [out async for out in stream]


def offline(prompts, params=None) -> list[list[int]]:
    engine = tiny_engine()
    ids = [engine.add(p, params or greedy(8)) for p in prompts]
    outputs = drain(engine)
    return [tokens_of(outputs[i]) for i in ids]


PROMPTS = [[5, 6, 7], [8] * 20, [9, 10], [11] * 33, [12, 13, 14, 15]] * 4


def test_streams_return_the_tokens_of_the_offline_engine():
    async def scenario(engine):
        return await asyncio.gather(*(tokens(engine, p) for p in PROMPTS))

    assert run(scenario) == offline(PROMPTS)


def test_a_stream_that_is_not_read_blocks_no_other_request():
    async def scenario(engine):
        request, answered = engine.intake.request((5, 6), greedy(40)), asyncio.Event()
        stream = engine.submit(request)
        stream.on_put = lambda: answered.set() if stream.outputs == 40 else None
        assert await tokens(engine, [5, 6, 7], greedy(60)) == offline_60
        await asyncio.wait_for(answered.wait(), 60)
        return [t async for out in stream for t in out.new_token_ids]

    (offline_60,) = offline([[5, 6, 7]], greedy(60))
    assert run(scenario) == offline([[5, 6]], greedy(40))[0]


def test_closing_a_stream_frees_its_blocks_before_the_next_step():
    async def scenario(engine):
        resume = pause_after_outputs(engine)
        stream = engine.submit(engine.intake.request((5,) * 30, greedy(90)))
        await anext(stream)
        stream.close()
        resume.set()
        assert [out async for out in stream] == []
        return await engine.call(lambda e: (e.num_running, e.scheduler.num_free_blocks == e.config.num_blocks))

    assert run(scenario) == (0, True)


def test_a_full_queue_refuses_requests_and_says_when_to_retry():
    async def scenario(engine):
        started, release = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def hold(_):  # blocks the engine's thread until the queue is full
            loop.call_soon_threadsafe(started.set)
            release.wait(60)

        engine._thread.call(hold)
        await started.wait()
        streams = [engine.submit(engine.intake.request((5,), greedy(2))) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 requests are waiting and the limit is 3; retry in 1 s") as refused:
            engine.submit(engine.intake.request((5,), greedy(2)))
        release.set()
        for stream in streams:
            assert len([out async for out in stream]) == 2
        return refused.value.retry_after

    assert run(scenario, max_queue=3) == 1


def test_the_estimate_of_the_wait_grows_with_the_queue():
    engine, waits = tiny_engine(), []
    full, done = threading.Event(), threading.Event()

    def deliver(events):  # in the engine's thread, right after it has published its load
        waits.append(thread.load.wait_seconds)
        if not engine.has_work:
            done.set()

    thread = EngineThread(engine, deliver)
    thread.call(lambda _: full.wait(60))
    for _ in range(200):
        thread.submit(engine.intake.request((5,) * 40, greedy(60)))
    full.set()
    assert done.wait(120)
    thread.close()
    assert max(waits) > 0
    assert waits[-1] == 0


def test_a_request_that_cannot_meet_its_promise_fails_with_the_reason():
    async def scenario(engine):
        with pytest.raises(RequestFailedError, match="retry when it is less busy") as failed:
            await tokens(engine, [5] * 20)
        return as_api_error(failed.value).status

    promises = {"policy": "sla", "promised_prompt_rate": 1e9, "promised_generation_rate": 1.0, "promise_grace": 0.0}
    assert run(scenario, engine=tiny_engine(**promises)) == 429


def test_a_deadline_ends_a_request_and_no_other():
    async def scenario(engine):
        other = asyncio.create_task(tokens(engine, [5, 6, 7], greedy(60)))
        with pytest.raises(RequestFailedError, match="deadline") as failed:
            await tokens(engine, [8, 9], greedy(90), timeout=0.0)
        assert failed.value.failure.kind == "deadline"
        return await other

    assert run(scenario) == offline([[5, 6, 7]], greedy(60))[0]


def test_a_lower_priority_number_runs_first():
    async def scenario(engine):
        order: list[str] = []

        async def one(name, priority):
            await tokens(engine, [5] * 30, greedy(20), priority=priority)
            order.append(name)

        crowd = [asyncio.create_task(one("late", 1)) for _ in range(16)]
        await asyncio.sleep(0)
        await asyncio.gather(one("first", -1), *crowd)
        return order

    assert "first" in run(scenario)[:9]  # eight run at the same time


@pytest.mark.parametrize("where", ["dispatch", "commit"])
def test_a_failed_step_ends_its_requests_and_the_queue_survives(monkeypatch, where):
    prompts = [[5 + i, 6] for i in range(20)]
    want = offline(prompts)
    engine = tiny_engine()
    failures = iter([False, False, True])
    owner, name = {"dispatch": (Packer, "pack"), "commit": (Stepper, "_publish_outputs")}[where]
    original = getattr(owner, name)

    def breaks(self, *args):
        if next(failures, False):
            raise RuntimeError("the device is gone")
        return original(self, *args)

    monkeypatch.setattr(owner, name, breaks)

    async def scenario(wrapped):
        results = await asyncio.gather(*(tokens(wrapped, p) for p in prompts), return_exceptions=True)
        assert wrapped.num_failed_steps == 1
        return results

    results = run(scenario)
    failed = [r for r in results if isinstance(r, RequestFailedError)]
    assert 1 <= len(failed) <= engine.config.max_num_seqs  # those of the step, not the queue
    assert all(r.failure.kind == "step" and "the device is gone" in str(r) for r in failed)
    assert [r for r, w in zip(results, want, strict=True) if r != w] == failed  # all others are unaffected


def test_an_engine_that_cannot_recover_leaves_no_request_hanging(monkeypatch):
    def breaks(self, *_):
        raise RuntimeError("the device is gone for good")

    monkeypatch.setattr(Packer, "pack", breaks)
    monkeypatch.setattr(Engine, "recover", breaks)
    engine = tiny_engine()

    async def scenario():
        wrapped = AsyncEngine(engine)
        results = await asyncio.gather(*(tokens(wrapped, [5 + i]) for i in range(12)), return_exceptions=True)
        assert {type(r) for r in results} <= {RequestFailedError, ClosedError}
        assert not wrapped.is_ready
        assert "could not recover" in (wrapped.failure or "")
        with pytest.raises(ClosedError):
            await wrapped.snapshots()
        with pytest.raises(ClosedError):
            await tokens(wrapped, [5])

    asyncio.run(asyncio.wait_for(scenario(), 60))
    monkeypatch.undo()
    engine.recover()  # for the following tests
    assert not engine.has_work


def test_a_wrong_request_raises_in_its_caller():
    async def scenario(engine):
        with pytest.raises(ValueError, match="prompt is empty"):
            await tokens(engine, [])
        with pytest.raises(ValueError, match="max_context_len is"):
            await tokens(engine, [5] * 500)
        request = engine.intake.request((5,), greedy(30), request_id="mine")
        stream = engine.submit(request)
        with pytest.raises(ValueError, match="'mine' is already in use"):
            engine.submit(request)
        stream.close()

    run(scenario)


def test_closing_ends_running_requests_with_an_error():
    async def scenario(engine):
        resume = pause_after_outputs(engine)
        stream = engine.submit(engine.intake.request((5,), greedy(90)))
        await anext(stream)
        closing = asyncio.create_task(engine.close())
        while not engine._thread._inbox.qsize():
            await asyncio.sleep(0)
        resume.set()
        await closing
        with pytest.raises(RequestFailedError, match="shutting down") as failed:
            await rest(stream)
        assert failed.value.failure.kind == "shutdown"
        with pytest.raises(ClosedError):
            engine.submit(engine.intake.request((5,), SamplingParams(max_new_tokens=1)))

    engine = tiny_engine()

    async def inside():
        wrapped = AsyncEngine(engine)
        await scenario(wrapped)

    asyncio.run(inside())
    drain(engine)


def test_draining_finishes_running_requests_and_refuses_new_ones():
    async def scenario(engine):
        task = asyncio.create_task(tokens(engine, [5, 6, 7], greedy(60)))
        while not engine.num_unfinished:
            await asyncio.sleep(0)
        drained = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await tokens(engine, [5])
        assert await drained
        engine._closed = False  # `run` checks the engine once more
        return await task

    assert run(scenario) == offline([[5, 6, 7]], greedy(60))[0]


def test_the_events_of_a_large_step_arrive_in_batches_and_in_order(monkeypatch):
    monkeypatch.setattr("fastgen_jax.api.async_engine.EVENTS_PER_TURN", 3)

    async def scenario(engine):
        streams = [engine.submit(engine.intake.request((5 + i,), greedy(12))) for i in range(8)]
        return [[t for out in await rest(stream) for t in out.new_token_ids] for stream in streams]

    assert run(scenario) == offline([[5 + i] for i in range(8)], greedy(12))
