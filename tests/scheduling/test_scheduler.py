"""The scheduler's contract: adding, overlap, commit, ending, prefix sharing, estimates."""

from __future__ import annotations

from typing import Any

import pytest

from fastgen_jax.scheduling import POLICIES, Scheduler, SequenceStatus, Step, StepPlan
from tests.scheduling.fake_device import FakeDevice, drive, make_request, naive_tokens, with_promise


def make_scheduler(**changes: Any) -> Scheduler:
    arguments: dict[str, Any] = {
        "num_blocks": 32,
        "block_size": 4,
        "token_budget": 16,
        "max_num_seqs": 4,
        "max_context_len": 100,
        "max_sample_rows": 4,
    }
    return Scheduler(**(arguments | changes))


def next_step(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    return step


def advance(scheduler: Scheduler, token_id: int = 0) -> Step:
    step = next_step(scheduler)
    scheduler.commit(step, [token_id] * len(step.sampled))
    return step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0; it must be at least 1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_context_len": 1}, "max_context_len is 1; it must be at least 2"),
        ({"max_sample_rows": 0}, "max_sample_rows is 0"),
        ({"max_bypasses": -1}, "max_bypasses is -1; it must be at least 0"),
        ({"watermark_blocks": -1}, "watermark_blocks is -1"),
        ({"policy": "fifo"}, "policy is 'fifo'; choose one of 'splitfuse', 'prompts_first', 'orca'"),
    ],
)
def test_an_invalid_argument_is_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheduler(**changes)


@pytest.mark.parametrize(
    ("prompt_length", "params", "message"),
    [
        (100, {}, r"has 100 tokens but max_context_len is 100 .* shorten the prompt to 39 tokens"),
        (
            9,
            {"max_new_tokens": None, "max_length": 9},
            r"max_length is 9 but .* has 9 tokens; raise .* at least 10",
        ),
        (
            30,
            {"max_new_tokens": None, "min_new_tokens": 11},
            r"min_new_tokens is 11 but only 10 tokens can follow",
        ),
        (
            10,
            {"max_new_tokens": 31},
            r"may grow to 41 tokens, 11 blocks of 4, .* 10 blocks; use max_new_tokens=30",
        ),
        (45, {"max_new_tokens": None}, r"46 tokens, 12 blocks of 4, .* 10 blocks; shorten the prompt"),
        (45, {"max_new_tokens": 1}, r"46 tokens, 12 blocks of 4, .* 10 blocks; shorten the prompt"),
    ],
)
def test_a_request_that_can_never_run_is_rejected_with_the_numbers(
    prompt_length: int, params: dict[str, Any], message: str
) -> None:
    scheduler = make_scheduler(num_blocks=10)
    request = make_request("a", range(prompt_length), **params)
    with pytest.raises(ValueError, match=message):
        scheduler.add(request)
    with pytest.raises(ValueError, match=message):
        scheduler.estimate_wait(request)
    assert not scheduler.has_work
    scheduler.add(make_request("a", range(10), 30))  # the remedy in the message works


@pytest.mark.parametrize("params", [{}, {"min_new_tokens": 30}])
def test_a_request_without_a_limit_may_fill_a_cache_smaller_than_the_context(params: dict[str, Any]) -> None:
    scheduler = make_scheduler(num_blocks=10)  # 40 tokens, with a context length of 100
    sequence = scheduler.add(make_request("a", range(10), max_new_tokens=None, **params))
    assert sequence.max_total_tokens == 40


def test_generation_ends_at_each_kind_of_limit() -> None:
    scheduler = make_scheduler(max_context_len=20)
    by_new = scheduler.add(make_request("new", range(5), 3))
    by_length = scheduler.add(make_request("length", range(5), None, max_length=7))
    by_context = scheduler.add(make_request("context", range(5), None))
    by_both = scheduler.add(make_request("both", range(5), 50))
    while scheduler.has_work:
        advance(scheduler)
    lengths = [len(sequence.output_token_ids) for sequence in (by_new, by_length, by_context, by_both)]
    assert lengths == [3, 2, 15, 15]
    assert {s.finish_reason for s in (by_new, by_length, by_context, by_both)} == {"length"}


def test_stop_tokens_end_a_sequence_after_the_minimum_of_generated_tokens() -> None:
    scheduler = make_scheduler()
    early = scheduler.add(make_request("early", range(7), 9, eos_token_ids=(3,)))
    held = scheduler.add(make_request("held", range(7), 9, eos_token_ids=(3,), min_new_tokens=4))
    ignoring = scheduler.add(make_request("ignoring", [0], 9, eos_token_ids=(3,), ignore_eos=True))
    stopping = scheduler.add(make_request("stopping", [0], 9, stop_token_ids=[3], ignore_eos=True))
    while scheduler.has_work:
        advance(scheduler, token_id=3)
    assert [len(s.output_token_ids) for s in (early, held, ignoring, stopping)] == [1, 5, 9, 1]
    assert [s.finish_reason for s in (early, held, ignoring, stopping)] == ["stop", "stop", "length", "stop"]


def test_a_step_is_scheduled_before_the_tokens_of_the_previous_one_are_known() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", range(5), 3))
    steps = [next_step(scheduler) for _ in range(3)]
    assert [(c.start, c.length) for step in steps for c in step.chunks] == [(0, 5), (5, 1), (6, 1)]
    assert sequence.num_in_flight == 3
    assert sequence.num_tokens == sequence.max_total_tokens
    assert scheduler.schedule() is None, "the tokens in flight reach its length limit"
    for step in steps:
        assert scheduler.commit(step, [7]) == [sequence]
    assert sequence.output_token_ids == [7, 7, 7]
    assert sequence.is_finished


def test_the_row_after_an_end_of_sequence_is_dropped() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", range(5), 9, eos_token_ids=(3,)))
    first, second = next_step(scheduler), next_step(scheduler)
    scheduler.commit(first, [3])
    assert sequence.finish_reason == "stop"
    assert scheduler.num_free_blocks == 32
    assert scheduler.commit(second, [1]) == []
    assert sequence.output_token_ids == [3]
    scheduler.check_integrity()


def test_steps_are_committed_once_and_in_order() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(5), 9))
    first, second = next_step(scheduler), next_step(scheduler)
    with pytest.raises(ValueError, match="not the oldest of the 2 in flight"):
        scheduler.commit(second, [0])
    with pytest.raises(ValueError, match="token_ids has 2 entries but the step samples 1 tokens"):
        scheduler.commit(first, [0, 0])
    scheduler.commit(first, [0])
    with pytest.raises(ValueError, match="not the oldest of the 1 in flight"):
        scheduler.commit(first, [0])


def test_abort_immediately_frees_everything_of_running_and_waiting_sequences() -> None:
    scheduler = make_scheduler(max_num_seqs=1, prefix_caching=False)
    running = scheduler.add(make_request("running", range(20), 9))
    waiting = scheduler.add(make_request("waiting", range(5), 9))
    step = next_step(scheduler)
    assert scheduler.abort("running")
    assert scheduler.abort("waiting")
    assert not scheduler.abort("running")
    assert not scheduler.abort("unknown")
    assert {running.status, waiting.status} == {SequenceStatus.FINISHED}
    assert {running.finish_reason, waiting.finish_reason} == {"abort"}
    assert not scheduler.has_work
    assert scheduler.num_free_blocks == 32
    assert scheduler.commit(step, [0] * len(step.sampled)) == []
    scheduler.add(make_request("running", range(5), 9))  # the id can be used again
    scheduler.check_integrity()


def test_finish_ends_a_sequence_and_only_changes_the_reason_of_a_finished_one() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", range(5), 9))
    advance(scheduler)
    scheduler.finish(sequence, "stop")
    assert (sequence.finish_reason, scheduler.has_work) == ("stop", False)
    ended = scheduler.add(make_request("b", range(5), 1))
    advance(scheduler)
    assert ended.finish_reason == "length"
    scheduler.finish(ended, "stop")
    assert ended.finish_reason == "stop"
    with pytest.raises(ValueError, match="reason is 'done'; choose one of 'stop', 'length', 'abort', 'refused'"):
        scheduler.finish(ended, "done")  # type: ignore[arg-type]
    scheduler.check_integrity()


def test_block_updates_contain_the_whole_table_first_and_then_only_new_blocks() -> None:
    scheduler = make_scheduler(token_budget=6)
    sequence = scheduler.add(make_request("a", range(7), 9))
    first, second, third = (advance(scheduler) for _ in range(3))
    assert first.admitted == [sequence]
    assert first.block_updates == [(0, 0, [0, 1])]
    assert second.admitted == second.block_updates == []
    assert third.block_updates == []
    assert advance(scheduler).block_updates == [(0, 2, [2])]


def test_a_later_request_starts_after_the_blocks_that_a_running_one_has_dispatched() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(14), 9))
    in_flight = next_step(scheduler)
    sharer = scheduler.add(make_request("b", range(14), 9))
    step = next_step(scheduler)
    assert [(c.sequence.request_id, c.start, c.length) for c in step.chunks] == [("a", 14, 1), ("b", 12, 2)]
    assert sharer.num_cached == scheduler.stats.num_prefix_hit_tokens == 12
    assert step.block_updates[-1] == (1, 0, [0, 1, 2, 4]), "three shared with a, and a new one"
    scheduler.commit(in_flight, [0])
    scheduler.check_integrity()


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(make_request(name, range(8), 1))
        step = advance(scheduler)
    assert [(c.start, c.length, c.num_sample_rows) for c in step.chunks] == [(4, 4, 1)]


def test_generated_tokens_of_one_request_are_cached_for_the_prompt_of_the_next() -> None:
    scheduler = make_scheduler()
    first = make_request("a", [1, 2, 1], 10)
    drive(scheduler, {0: [first]}, depth=1)
    turn = make_request("b", [1, 2, 1, *naive_tokens(first, 100), 2], 2)
    sequence = scheduler.add(turn)
    advance(scheduler)
    assert sequence.num_cached == 12, "of 13 tokens in the first turn, of which the last was never computed"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=8, max_context_len=32, watermark_blocks=0)
    requests = [make_request(i, [i] * 8, max_new, seed_number=i) for i, max_new in enumerate((14, 24))]
    run = drive(scheduler, {0: requests})
    victim = run.sequences["1"]
    assert victim.num_preemptions > 0
    assert victim.num_cached == 0, "it counts only blocks that were cached before the sequence first ran"
    assert scheduler.stats.num_prefix_hit_tokens > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [2, 3])
def test_a_sequence_preempted_with_tokens_in_flight_looks_up_only_blocks_of_known_tokens(policy: str, depth: int) -> None:
    for num_blocks in (8, 9, 12):
        scheduler = make_scheduler(**with_promise(policy), num_blocks=num_blocks, block_size=2, watermark_blocks=0)
        requests = [make_request(i, [i] * 4, 12, ignore_eos=True) for i in range(2)]
        run = drive(scheduler, {0: requests}, depth=depth)
        assert scheduler.stats.num_preemptions > 0
        assert [run.sequences[r.request_id].output_token_ids for r in requests] == [naive_tokens(r, 100) for r in requests]


@pytest.mark.parametrize("known", [0, 1, 3])
def test_starting_over_keeps_the_known_tokens_and_computes_the_same_ones_again(known: int) -> None:
    scheduler = make_scheduler(num_blocks=8, watermark_blocks=0)
    requests = [make_request(i, [i] * 5, 8, seed_number=i, prompt_logprobs=0 if i else None) for i in range(3)]
    sequences = [scheduler.add(request) for request in requests]
    device = FakeDevice(num_blocks=8, block_size=4, max_num_seqs=4)
    for _ in range(4):
        step = next_step(scheduler)
        scheduler.commit(step, device.run(step))
    scheduler.schedule()
    scheduler._state.waiting, scheduler._state.free_slots, scheduler._state.unfinished = (
        [],
        [],
        {},
    )  # as an exception might leave them
    scheduler.start_over((sequence, min(known, len(sequence.output_token_ids))) for sequence in sequences)
    scheduler.check_integrity()
    drive(scheduler, {})
    assert [s.output_token_ids for s in sequences] == [naive_tokens(r, 100) for r in requests]


def test_a_policy_that_plans_nothing_is_reported_instead_of_waiting_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(POLICIES, "idle", lambda planner: StepPlan([], [], [], [], []))
    scheduler = make_scheduler(policy="idle")
    assert scheduler.schedule() is None
    scheduler.add(make_request("a", range(8), 1))
    with pytest.raises(RuntimeError, match="planned nothing for 0 running and 1 waiting sequences"):
        scheduler.schedule()


def test_the_estimated_wait_is_exact_while_nothing_ends_early() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    assert scheduler.estimate_wait(make_request("x", range(16), 4)) == 1
    assert scheduler.estimate_wait(make_request("x", range(33), 4)) == 3
    for i in range(4):
        scheduler.add(make_request(i, range(8), 10))
    request = make_request("x", range(16), 4)
    estimate = scheduler.estimate_wait(request)
    sequence = scheduler.add(request)
    steps = 0
    while not sequence.output_token_ids:
        advance(scheduler)
        steps += 1
    assert abs(estimate - steps) <= 2, (estimate, steps)


def test_the_estimated_wait_respects_priority_slots_and_blocks() -> None:
    scheduler = make_scheduler(prefix_caching=False, max_num_seqs=1)
    scheduler.add(make_request("running", range(8), 20))
    advance(scheduler)
    for_slot = scheduler.estimate_wait(make_request("x", range(8), 4))
    assert 19 <= for_slot <= 21
    scheduler.add(make_request("queued", range(8), 20))
    assert 38 <= scheduler.estimate_wait(make_request("x", range(8), 4)) <= 43
    assert scheduler.estimate_wait(make_request("x", range(8), 4, priority=-1)) == for_slot
    short = make_scheduler(prefix_caching=False, num_blocks=8)
    short.add(make_request("running", range(12), 20))
    advance(short)
    assert short.estimate_wait(make_request("x", range(8), 4)) == 1
    assert short.estimate_wait(make_request("x", range(24), 4)) >= 20


def test_the_integrity_check_finds_tampering() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", range(8), 9))
    advance(scheduler)
    scheduler.check_integrity()
    sequence.capacity += 4
    with pytest.raises(RuntimeError, match="has a capacity of 12 positions"):
        scheduler.check_integrity()
    sequence.capacity -= 4
    sequence.num_computed = 9
    with pytest.raises(RuntimeError, match="computed more than it has tokens"):
        scheduler.check_integrity()
    sequence.num_computed = 8
    sequence.slot = 1
    with pytest.raises(RuntimeError, match="every slot must be free or used exactly once"):
        scheduler.check_integrity()
