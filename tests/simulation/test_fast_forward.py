"""Skipping steps gives the same result and the same scheduler state as running them one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.bench.loads import Load, closed_loop, open_loop
from fastgen_jax.scheduling import POLICIES, Promise, Request, SamplingParams, Scheduler
from fastgen_jax.simulation import Replica, ReplicaConfig, StepShape, simulate


def cost(shape: StepShape) -> float:
    """A cost that differs for every step, and whose sums are rounded."""
    return 0.01 + 0.001 * shape.num_tokens + 1e-5 * shape.decode_attended + 1e-6 * shape.prompt_attended


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Load, ReplicaConfig, int]:
    """A load, a replica configuration that may be short of blocks and slots, and a number of replicas."""
    lengths = {
        "num_requests": draw(st.integers(1, 25)),
        "mean_prompt": draw(st.integers(4, 40)),
        "mean_output": draw(st.integers(4, 60)),
        "seed": draw(st.integers(0, 99)),
        "max_prompt": 80,
    }
    if draw(st.booleans()):
        load = closed_loop(draw(st.integers(1, 6)), warmup=draw(st.integers(0, 1)), **lengths)
    else:
        load = open_loop(draw(st.sampled_from([0.5, 3.0, 20.0])), gap_cv=2.0, **lengths)
    block_size = draw(st.integers(1, 16))
    windows = draw(st.sampled_from([(None,), (None,), (None, 9), (20,)]))
    max_num_seqs = draw(st.integers(1, 8))
    deterministic = draw(st.booleans())
    least = max_num_seqs - 1 + block_size if deterministic else 3
    config = ReplicaConfig(
        num_blocks=-(-load.longest_context // block_size) * len(windows) + draw(st.integers(0, 60)),
        block_size=block_size,
        windows=windows,
        max_context_len=load.longest_context,
        policy="splitfuse" if deterministic else draw(st.sampled_from([p for p in POLICIES if p != "sla"])),
        token_budget=draw(st.integers(least, least + 29)),
        max_num_seqs=max_num_seqs,
        deterministic=deterministic,
        overlap=draw(st.booleans()),
        host_seconds=draw(st.sampled_from([0.0, 0.004, 0.02])),
        prefix_caching=draw(st.booleans()),
    )
    return load, config, draw(st.integers(1, 3))


@given(world=worlds())
@settings(max_examples=60, deadline=None)
def test_fast_forward_gives_the_result_of_single_steps_to_the_last_bit(world: tuple[Load, ReplicaConfig, int]) -> None:
    load, config, num_replicas = world
    fast = simulate(load, config, cost, num_replicas=num_replicas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replica, "fast_forward", lambda self, now, horizon: now)
        assert repr(fast) == repr(simulate(load, config, cost, num_replicas=num_replicas))


def scheduler_of(num_sequences: int, *, prefix_caching: bool, **options: Any) -> Scheduler:
    scheduler = Scheduler(
        **{
            "num_blocks": 20,
            "block_size": 8,
            "token_budget": 64,
            "max_num_seqs": 8,
            "max_context_len": 100,
            "max_sample_rows": 8,
            "prefix_caching": prefix_caching,
            **options,
        }
    )
    for i in range(num_sequences):
        params = SamplingParams(max_new_tokens=12 + 3 * i, ignore_eos=True)
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=(i,) * (3 + i), params=params, seed=0))
    return scheduler


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_scheduler_that_skipped_steps_equals_one_that_ran_them(overlap: bool, prefix_caching: bool) -> None:
    skipping, stepping = (scheduler_of(3, prefix_caching=prefix_caching) for _ in range(2))
    numbers = [0, 0]
    flights: list[Any] = [None, None]

    def step(which: int) -> None:
        scheduler = (skipping, stepping)[which]
        planned = scheduler.schedule()
        due, flights[which] = (flights[which], planned) if overlap else (planned, None)
        if due is not None:
            scheduler.commit(due, [numbers[which]] * len(due.sampled))
            numbers[which] += 1

    num_skipped = 0
    while skipping.has_work:
        run = skipping.steady_run()
        if run:
            num_skipped += run.num_steps
            count = run.num_steps
            flights[0] = skipping.skip(count, range(numbers[0], numbers[0] + count))
            numbers[0] += count
            for _ in range(count):
                step(1)
        else:
            step(0)
            step(1)
        for a, b in zip(skipping._state.running, stepping._state.running, strict=True):
            for name in ("num_computed", "num_tokens", "output_token_ids", "block_ids", "capacity", "next_block_end"):
                assert getattr(a, name) == getattr(b, name), name
        assert [c[1:] for c in flights[0].chunks] == [c[1:] for c in flights[1].chunks] if flights[0] else not flights[1]
        assert skipping.num_free_blocks == stepping.num_free_blocks
        skipping.check_integrity()
    assert skipping.stats == stepping.stats
    assert num_skipped > (3 if prefix_caching else 10)


def test_steps_in_which_something_is_decided_are_not_skipped() -> None:
    waiting = scheduler_of(2, prefix_caching=False, max_num_seqs=1)
    stopping = Scheduler(num_blocks=9, block_size=4, token_budget=8, max_num_seqs=2, max_context_len=30, max_sample_rows=2)
    params = SamplingParams(max_new_tokens=12, stop_token_ids=(7,))
    stopping.add(Request(request_id="s", prompt_token_ids=(1, 2), params=params, seed=0))
    promise = Promise(prompt_rate=100.0, generation_rate=1.0)
    learning = scheduler_of(1, prefix_caching=False, policy="sla", promise=promise, clock=lambda: 0.0)
    short = scheduler_of(2, prefix_caching=False, num_blocks=3)
    for scheduler in (waiting, stopping, learning, short):
        for _ in range(2):
            step = scheduler.schedule()
            assert step is not None
            scheduler.commit(step, [0] * len(step.sampled))
        assert scheduler.steady_run() is None
