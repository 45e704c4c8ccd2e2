"""Resetting the prefix cache, and restoring the owners of blocks after an interrupt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.scheduling import BlockPool, Scheduler
from tests.scheduling.fake_device import drive, make_request, naive_tokens
from tests.scheduling.test_properties import ANY_WORKLOAD, Workload, workloads

SIZES = {
    "num_blocks": 24,
    "block_size": 4,
    "token_budget": 16,
    "max_num_seqs": 4,
    "max_context_len": 64,
    "max_sample_rows": 4,
}


def run(scheduler: Scheduler, *requests: Any) -> list[Any]:
    """The sequences of requests served one after another."""
    sequences = []
    for request in requests:
        sequences.append(scheduler.add(request))
        while scheduler.has_work:
            step = scheduler.schedule()
            assert step is not None
            scheduler.commit(step, [0] * len(step.sampled))
    return sequences


def test_after_a_reset_no_earlier_prefix_is_found() -> None:
    scheduler = Scheduler(**SIZES)
    assert [s.num_cached for s in run(scheduler, make_request("a", range(12)), make_request("b", range(12)))] == [0, 8]
    scheduler.reset_prefix_cache()
    scheduler.check_integrity()
    assert [s.num_cached for s in run(scheduler, make_request("a", range(12)), make_request("b", range(12)))] == [0, 8]


def test_blocks_that_a_running_sequence_fills_after_a_reset_are_never_found() -> None:
    scheduler = Scheduler(**SIZES)
    long = scheduler.add(make_request("long", range(4), 20, ignore_eos=True))

    def step() -> None:
        step = scheduler.schedule()
        assert step is not None
        scheduler.commit(step, [0] * len(step.sampled))

    step()
    scheduler.reset_prefix_cache()
    for _ in range(10):
        step()
    # The same prefix is found again once it is recomputed; the blocks that the old sequence filled after it are not.
    text = (0, 1, 2, 3, *[0] * 8)
    fresh = scheduler.add(make_request("fresh", text[:5], 1))
    step()
    after = scheduler.add(make_request("after", (*text, 1), 1))
    step()
    assert (fresh.num_cached, after.num_cached) == (0, 4)
    while scheduler.has_work:
        step()
    assert len(long.output_token_ids) == 20
    scheduler.check_integrity()


@given(workload=workloads(), when=st.integers(0, 12))
@ANY_WORKLOAD
def test_a_reset_at_any_step_changes_no_token(workload: Workload, when: int) -> None:
    scheduler = Scheduler(**workload.arguments)
    schedule, calls = scheduler.schedule, iter(range(10_000))

    def resetting() -> Any:
        if next(calls) == when:
            scheduler.reset_prefix_cache()
        return schedule()

    scheduler.schedule = resetting
    result = drive(scheduler, workload.arrivals, depth=1, aborts=workload.aborts)
    for request in workload.requests:
        sequence = result.sequences[request.request_id]
        if sequence.finish_reason != "abort":
            assert sequence.output_token_ids == naive_tokens(request, scheduler.max_context_len)


def test_shared_blocks_are_free_when_each_share_is_returned() -> None:
    scheduler = Scheduler(**SIZES)
    blocks = scheduler.borrow_blocks(3)
    scheduler.share_blocks(blocks[:2])
    assert [scheduler.num_owners(block) for block in blocks] == [2, 2, 1]
    scheduler.check_integrity()
    scheduler.return_blocks(blocks)
    assert scheduler.num_free_blocks == 22
    scheduler.return_blocks(blocks[:2])
    assert scheduler.num_free_blocks == 24
    scheduler.check_integrity()


def test_settling_frees_blocks_that_an_interrupt_left_without_owner() -> None:
    scheduler = Scheduler(**SIZES)
    run(scheduler, make_request("cached", range(12)))
    kept = scheduler.borrow_blocks(2)
    running = scheduler.add(make_request("running", range(12, 24), 4))
    assert scheduler.schedule() is not None
    scheduler._pool.allocate(3)  # as if an interrupt came right after the allocation
    with pytest.raises(RuntimeError, match="owners"):
        scheduler.check_integrity()
    scheduler.settle_blocks(kept)
    scheduler.check_integrity()
    assert scheduler.num_free_blocks == 24 - 2 - len(running.block_ids)
    again = scheduler.add(make_request("again", range(12), 1))
    assert scheduler.schedule() is not None
    assert again.num_cached == 8, "cached blocks are still found"


@given(st.lists(st.sampled_from(["allocate", "share", "free", "register", "lookup", "forget"]), max_size=40), st.randoms())
def test_settling_a_consistent_pool_changes_nothing(operations: list[str], random: Any) -> None:
    pool, held, digests = BlockPool(6, 4), [], []
    for operation in operations:
        if operation == "allocate" and pool.num_free:
            held.append(pool.allocate(1))
        elif operation == "share" and held:
            held.append(random.choice(held))
            pool.share(held[-1])
        elif operation == "free" and held:
            pool.free(held.pop(random.randrange(len(held))))
        elif operation == "register" and held:
            digests.append(pool.digest(None, [len(digests)] * 4))
            pool.register(random.choice(held)[0], digests[-1])
        elif operation == "lookup" and digests and (found := pool.lookup([random.choice(digests)])):
            pool.share(found)
            held.append(found)
        elif operation == "forget":
            pool.forget_contents()
        pool.check_integrity(held)
    free, found = pool.num_free, [pool.lookup([digest]) for digest in digests]
    idle = list(pool._idle)
    pool.settle(held)
    pool.check_integrity(held)
    assert (pool.num_free, [pool.lookup([digest]) for digest in digests], list(pool._idle)) == (free, found, idle)
