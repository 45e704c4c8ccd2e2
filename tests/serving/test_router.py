"""The router's choice of a replica, and what happens to requests when a replica dies."""

from __future__ import annotations

import asyncio
import time

import pytest

from fastgen_jax import EngineConfig
from fastgen_jax.api.async_engine import ClosedError, RequestFailedError
from fastgen_jax.api.engine_thread import Load
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.outputs import RequestOutput
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.serving import router
from fastgen_jax.serving.frames import pack
from fastgen_jax.serving.remote import PIECE, prefix_pieces
from fastgen_jax.serving.router import Router
from tests.serving.tiny_server import engine, tokenizer


class Fixture:
    """A router whose replicas are ready and only record what they are sent."""

    def __init__(self, replicas: int = 2, **options):
        shared = engine()
        self.router = Router("nowhere", EngineConfig(), tokenizer(), shared.model, replicas=replicas, **options)
        self.router._intake = Intake(tokenizer(), shared.model, shared.config)
        self.sent: list[list[tuple]] = [[] for _ in range(replicas)]
        for number, replica in enumerate(self.router.replicas):
            replica.is_ready = True
            replica.write = lambda *message, number=number: self.sent[number].append(message)

    def submit(self, prompt, max_new_tokens=8):
        request = self.router.intake.request(tuple(prompt), SamplingParams(max_new_tokens=max_new_tokens, seed=1))
        return request, self.router.submit(request)

    def replica_of(self, request) -> int:
        (number,) = [i for i, r in enumerate(self.router.replicas) if request.request_id in r.requests]
        return number

    def say(self, number, request, token_ids, *, finished=False):
        output = RequestOutput(
            request_id=request.request_id,
            new_token_ids=tuple(token_ids),
            text="".join(map(str, token_ids)),
            finished=finished,
            finish_reason="length" if finished else None,
            logprobs=None,
            prompt_logprobs=None,
            num_prompt_tokens=1,
            num_cached_tokens=0,
            num_generated_tokens=1,
        )
        self.router._handle(self.router.replicas[number], ("events", [output], Load()), asyncio.Event())

    def die(self, number):
        replica = self.router.replicas[number]
        replica.is_ready = False
        interrupted, _ = list(replica.requests.values()), replica.requests.clear()
        for routed in interrupted:
            self.router._reroute(routed)

    def live(self, number):
        self.router._handle(self.router.replicas[number], ("ready", engine().config), asyncio.Event())

    def report(self, number, load):
        self.router._handle(self.router.replicas[number], ("events", [], load), asyncio.Event())


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 60))


def test_each_prompt_goes_to_the_replica_with_the_least_work():
    async def scenario():
        f = Fixture()
        long, _ = f.submit([5] * 60)
        short = [f.submit([6])[0] for _ in range(3)]
        later, _ = f.submit([7])
        assert [f.replica_of(r) for r in short] == [1 - f.replica_of(long)] * 3  # less work together
        assert f.replica_of(later) == 1 - f.replica_of(long)

    run(scenario)


def test_prompts_with_a_common_prefix_go_to_the_same_replica_unless_it_is_too_busy():
    pieces = prefix_pieces(list(range(2 * PIECE + 5)))
    assert len(pieces) == 2
    assert prefix_pieces(list(range(PIECE)))[0] == pieces[0]

    async def scenario():
        f = Fixture()
        prompt = [5] * (PIECE + 10)
        first, _ = f.submit(prompt, 4)
        f.say(f.replica_of(first), first, [1] * 4, finished=True)
        again, _ = f.submit([*prompt, 9], 4)
        assert f.replica_of(again) == 0
        third, _ = f.submit(prompt, 20)
        assert f.replica_of(third) == 1  # sharing the prefix saves less than waiting costs

    run(scenario)


def test_unfinished_requests_of_a_dead_replica_run_elsewhere_without_repeating_tokens():
    async def scenario():
        f = Fixture()
        request, stream = f.submit([5])
        started, other = f.replica_of(request), 1 - f.replica_of(request)
        f.say(started, request, [1])
        f.say(started, request, [2])
        assert [(await anext(stream)).new_token_ids for _ in range(2)] == [(1,), (2,)]
        f.die(started)
        assert f.sent[other][-1][0] == "submit"
        for tokens in ([1], [2], [3]):
            f.say(other, request, tokens)
        f.say(other, request, [4], finished=True)
        assert [out.new_token_ids async for out in stream] == [(3,), (4,)]
        assert f.router.num_unfinished == 0
        f.say(other, request, [5])  # late: it is ignored

    run(scenario)


def test_a_request_fails_if_another_replica_generates_different_tokens():
    async def scenario():
        f = Fixture()
        request, stream = f.submit([5])
        f.say(f.replica_of(request), request, [1])
        await anext(stream)
        dead = f.replica_of(request)
        f.die(dead)
        f.say(1 - dead, request, [9])
        with pytest.raises(RequestFailedError, match="generates different tokens"):
            await anext(stream)

    run(scenario)


def test_without_a_ready_replica_requests_wait():
    async def scenario():
        f = Fixture(replicas=1)
        request, stream = f.submit([5])
        f.die(0)
        assert not f.router.is_ready
        f.router.replicas[0].is_ready = False
        f.sent[0].clear()
        f.router._handle(f.router.replicas[0], ("ready", engine().config), asyncio.Event())
        assert [m[0] for m in f.sent[0]] == ["submit"]
        f.say(0, request, [1], finished=True)
        assert [out.new_token_ids async for out in stream] == [(1,)]

    run(scenario)


def test_a_disconnected_client_aborts_its_request_in_the_replica():
    async def scenario():
        f = Fixture(replicas=1)
        request, stream = f.submit([5])
        stream.close()
        assert f.sent[0][-1] == ("abort", request.request_id)
        assert f.router.num_unfinished == 0

    run(scenario)


def test_draining_waits_until_the_last_request_has_ended_or_the_time_is_over():
    async def scenario():
        f = Fixture()
        requests = [f.submit([i])[0] for i in (5, 6)]
        assert not await f.router.drain(0)
        with pytest.raises(ClosedError, match="shutting down"):
            f.submit([7])
        draining = asyncio.create_task(f.router.drain(3600))
        for request in requests:
            assert not draining.done()
            f.say(f.replica_of(request), request, [1], finished=True)
        assert await draining

    run(scenario)


def test_a_request_that_kills_replicas_fails_and_the_others_beside_it_do_not():
    async def scenario():
        f = Fixture(replicas=1)
        companion, poison = f.submit([5]), f.submit([6])
        for _ in range(2):  # either of them could be the cause
            f.die(0)
            f.live(0)
        alone = f.router.replicas[0].requests
        assert len(alone) == 1, "suspects run one at a time"
        if companion[0].request_id in alone:
            f.say(0, companion[0], [1], finished=True)
        assert list(f.router.replicas[0].requests) == [poison[0].request_id]
        bystander = f.submit([7])
        f.die(0)
        with pytest.raises(RequestFailedError, match="3 replicas died while they ran this request"):
            await anext(poison[1])
        f.live(0)
        f.say(0, bystander[0], [2], finished=True)
        assert [out.new_token_ids async for out in bystander[1]] == [(2,)]
        assert [out.new_token_ids async for out in companion[1]] == [(1,)]
        assert f.router.num_unfinished == 0

    run(scenario)


def test_a_replica_that_keeps_dying_is_given_up_and_reported(monkeypatch):
    async def scenario():
        f = Fixture(replicas=1)
        (replica,) = f.router.replicas

        async def start():  # ready, and dead immediately
            replica.num_starts += 1
            replica.started = time.monotonic()
            reader = asyncio.StreamReader()
            reader.feed_data(pack(("ready", engine().config)))
            reader.feed_eof()
            return reader

        monkeypatch.setattr(replica, "start", start)
        monkeypatch.setattr(router, "PAUSE_SECONDS", 0)
        replica.is_ready = True
        streams = [f.submit([i])[1] for i in (5, 6)]
        f.die(0)
        await f.router._supervise(replica, asyncio.Event())
        for stream in streams:  # either of them may have been the third death
            with pytest.raises(RequestFailedError, match=r"3 replicas died|every replica was given up after 3 starts"):
                await anext(stream)
        assert replica.num_starts == 3
        assert not f.router.is_ready
        assert "given up" in (f.router.failure or "")
        with pytest.raises(ClosedError, match="given up"):
            f.submit([5])

    run(scenario)


@pytest.mark.slow
def test_a_model_that_no_replica_can_load_is_reported():
    async def scenario():
        router = Router("nowhere/at-all", EngineConfig(), tokenizer(), engine().model, replicas=2)
        with pytest.raises(ValueError, match="nowhere/at-all"):
            await router.start()
        assert all(replica.process is None for replica in router.replicas)

    run(scenario)


def test_replicas_sleep_on_their_own_and_one_that_is_awake_is_preferred():
    async def scenario():
        fixture = Fixture()
        router, prompt = fixture.router, [7] * (PIECE + 1)
        first, _ = fixture.submit(prompt)
        number = fixture.replica_of(first)
        fixture.say(number, first, [1], finished=True)
        fixture.report(number, Load(is_asleep=True))
        assert not router.is_asleep
        second, _ = fixture.submit(prompt)
        assert fixture.replica_of(second) == 1 - number, "the prefix is no longer cached where it was"
        fixture.say(1 - number, second, [1], finished=True)
        fixture.report(1 - number, Load(is_asleep=True))
        assert router.is_asleep
        assert router.is_ready
        fixture.replica_of(fixture.submit(prompt)[0])
        fixture.report(number, Load())
        assert not router.is_asleep

    run(scenario)


def test_each_replica_is_told_when_to_sleep():
    async def scenario():
        return [replica.plan.sleep_idle for replica in Fixture(sleep_idle=2.5).router.replicas]

    assert run(scenario) == [2.5, 2.5]
