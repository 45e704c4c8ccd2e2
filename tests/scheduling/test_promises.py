"""The policy that keeps a promise: short steps, prompts by deadline, and no request left waiting past its deadline."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.scheduling import Pace, Promise, Request, Scheduler, Sequence
from tests.scheduling.fake_device import EOS, drive, make_request, naive_tokens
from tests.scheduling.test_properties import ANY_WORKLOAD, Workload, workloads


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(clock: Clock, **changes: Any) -> Scheduler:
    arguments: dict[str, Any] = {
        "num_blocks": 256,
        "block_size": 4,
        "token_budget": 64,
        "max_num_seqs": 16,
        "max_context_len": 200,
        "max_sample_rows": 16,
        "prefix_caching": False,
        "policy": "sla",
        "clock": clock,
        "promise": Promise(prompt_rate=10.0, generation_rate=2.0, grace=0.0),
    }
    return Scheduler(**(arguments | changes))


def run_step(scheduler: Scheduler, clock: Clock, seconds_per_token: float = 0.01) -> list[tuple[str, int]]:
    """Runs a step that takes time in proportion to its tokens; returns its chunks as (request id, length)."""
    step = scheduler.schedule()
    if step is None:
        return []
    clock.now += step.num_tokens * seconds_per_token
    scheduler.commit(step, [0] * len(step.sampled))
    return [(chunk.sequence.request_id, chunk.length) for chunk in step.chunks]


def test_a_pace_fits_a_line_to_the_steps() -> None:
    pace = Pace(Promise(prompt_rate=1.0, generation_rate=4.0), Clock())
    assert pace.line() == (0.0, 0.0)
    assert pace.tokens_within_a_gap() == float("inf")
    for tokens in (4, 64, 8, 64, 4):
        pace.observe(tokens, 0.05 + 0.002 * tokens)
    assert pace.line() == pytest.approx((0.05, 0.002))
    # 90% of a gap of 0.25 s, less 0.05 s, is 0.175 s: 87.5 tokens.
    assert pace.tokens_within_a_gap() == pytest.approx(87.5)


def test_steps_of_one_size_are_attributed_to_their_tokens() -> None:
    pace = Pace(Promise(prompt_rate=1.0, generation_rate=4.0), Clock())
    for _ in range(3):
        pace.observe(100, 0.2)
    assert pace.line() == pytest.approx((0.0, 0.002))


def test_a_padded_step_is_planned_with_its_padded_size() -> None:
    pace = Pace(Promise(prompt_rate=1.0, generation_rate=4.0), Clock(), (16, 64, 128))
    for tokens, size in ((3, 16), (40, 64), (64, 64), (10, 16)):
        pace.observe(tokens, 0.05 + 0.002 * size)
    assert pace.line() == pytest.approx((0.05, 0.002))
    assert pace.tokens_within_a_gap() == 64, "87 tokens would fit, but would be padded to 128"


def test_a_step_with_generation_fits_into_the_promised_gap() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock, promise=Promise(prompt_rate=10.0, generation_rate=4.0))
    scheduler.add(make_request("a", range(8), 50))
    run_step(scheduler, clock)
    scheduler.add(make_request("long", range(150), 2, arrival_time=clock.now))
    # A token takes 10 ms, so 22 of them fit into 0.9 * 0.25 s.
    assert run_step(scheduler, clock) == [("a", 1), ("long", 21)]
    assert run_step(scheduler, clock) == [("a", 1), ("long", 21)]


def test_without_generation_a_step_uses_the_whole_budget() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock, promise=Promise(prompt_rate=10.0, generation_rate=4.0))
    scheduler.add(make_request("a", range(8), 1))
    run_step(scheduler, clock)
    scheduler.add(make_request("long", range(150), 2, arrival_time=clock.now))
    assert run_step(scheduler, clock) == [("long", 64)]


def test_the_prompt_that_is_due_first_runs_first() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock)
    scheduler.add(make_request("long", range(100), 2))  # due at 10 s
    scheduler.add(make_request("short", range(20), 2))  # due at 2 s
    assert run_step(scheduler, clock) == [("short", 20), ("long", 44)]


def test_requests_that_cannot_be_on_time_are_refused_and_the_others_are_served() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock)
    scheduler.add(make_request("warm_up", range(8), 1))
    run_step(scheduler, clock, seconds_per_token=0.05)
    clock.now = 5.0
    late = scheduler.add(make_request("late", range(20), 4, arrival_time=3.5))  # due at 5.5, 1 s of work left
    fine = scheduler.add(make_request("fine", range(20), 4, arrival_time=5.0))
    assert run_step(scheduler, clock, seconds_per_token=0.05) == [("fine", 20), ("late", 20)], (
        "late gets the leftover tokens"
    )
    assert scheduler.take_refused() == []
    gone = scheduler.add(make_request("gone", range(20), 4, arrival_time=4.5))  # due at 6.5, and it is 7.0
    assert run_step(scheduler, clock, seconds_per_token=0.05) == [("late", 1), ("fine", 1)]
    assert scheduler.take_refused() == [gone]
    assert scheduler.take_refused() == []
    assert (gone.finish_reason, gone.output_token_ids, gone.is_finished) == ("refused", [], True)
    assert late.finish_reason is fine.finish_reason is None
    scheduler.check_integrity()


def test_a_late_prompt_takes_no_tokens_from_one_that_is_on_time() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock, promise=Promise(prompt_rate=10.0, generation_rate=2.0, grace=10.0))
    scheduler.add(make_request("warm_up", range(8), 1))
    run_step(scheduler, clock, seconds_per_token=0.04)
    clock.now = 5.0
    scheduler.add(make_request("late", range(20), 4, arrival_time=3.0))
    scheduler.add(make_request("fine", range(60), 4, arrival_time=5.0))
    assert run_step(scheduler, clock, seconds_per_token=0.04) == [("fine", 60)], "late would have to be split"


def test_when_all_requests_are_refused_there_is_no_step_and_the_scheduler_is_idle() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock)
    clock.now = 100.0
    scheduler.add(make_request("late", range(20), 4))
    assert scheduler.schedule() is None
    assert not scheduler.has_work
    assert [s.request_id for s in scheduler.take_refused()] == ["late"]


def test_if_not_all_prompts_can_be_on_time_most_are() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock, promise=Promise(prompt_rate=25.0, generation_rate=2.0))
    scheduler.add(make_request("warm_up", range(8), 1))
    run_step(scheduler, clock, seconds_per_token=0.02)
    # At 50 tokens/s: six prompts of 20 tokens, each due after 0.8 s, and one of 100, due after 4 s.
    scheduler.add(make_request("long", range(100), 1, arrival_time=clock.now))
    for i in range(6):
        scheduler.add(make_request(i, range(20), 1, arrival_time=clock.now + 0.3 * i))
    order = []
    while scheduler.has_work:
        order += [name for name, _ in run_step(scheduler, clock, seconds_per_token=0.02)]
    refused = {s.request_id for s in scheduler.take_refused()}
    assert len(refused) <= 2
    assert set(order) | refused == {"long", *map(str, range(6))}
    assert not set(order) & refused


def test_a_promise_goes_with_the_policies_that_need_one_and_no_others() -> None:
    with pytest.raises(
        ValueError, match="policy is 'sla' and promise is None; set a promise with policy 'sla', and with no other"
    ):
        make_scheduler(Clock(), promise=None)
    with pytest.raises(ValueError, match="policy is 'splitfuse' and promise is Promise"):
        make_scheduler(Clock(), policy="splitfuse")
    with pytest.raises(ValueError, match="generation_rate is 0; it must be a number of tokens per second above 0"):
        Promise(prompt_rate=1.0, generation_rate=0)


class DeadlineChecker(Scheduler):
    """Checks after each plan that no sequence waits for a first token that is overdue."""

    def schedule(self):
        step = super().schedule()
        assert self._pace is not None
        for sequence in self._state.waiting:
            if not sequence.num_preemptions:
                assert self._pace.now() <= self._pace.promise.deadline(sequence) + 1.0, "neither served nor refused in time"
        return step


@pytest.mark.parametrize("depth", [0, 1])
@given(workload=workloads(), prompt_rate=st.floats(0.5, 20.0), generation_rate=st.floats(0.02, 2.0))
@ANY_WORKLOAD
def test_every_request_is_started_or_refused_on_time(
    depth: int, workload: Workload, prompt_rate: float, generation_rate: float
) -> None:
    clock = Clock()
    promise = Promise(prompt_rate=prompt_rate, generation_rate=generation_rate)
    scheduler = DeadlineChecker(policy="sla", promise=promise, clock=clock, **workload.arguments)

    def timed(step):
        clock.now += 0.1 + 0.02 * step.num_tokens
        return step

    plan = scheduler.schedule
    scheduler.schedule = lambda: (step := plan()) and timed(step)  # type: ignore[method-assign]
    refused: set[Sequence] = set()
    run = drive(scheduler, workload.arrivals, depth=depth, aborts=workload.aborts)
    refused.update(scheduler.take_refused())
    for request in workload.requests:
        check_outcome(request, run.sequences[request.request_id], refused, scheduler.max_context_len)


def check_outcome(request: Request, sequence: Sequence, refused: set[Sequence], max_context_len: int) -> None:
    expected = naive_tokens(request, max_context_len)
    if sequence.finish_reason == "refused":
        assert sequence in refused
        assert sequence.output_token_ids == []
    elif sequence.finish_reason == "abort":
        assert sequence.output_token_ids == expected[: len(sequence.output_token_ids)]
    else:
        assert sequence.output_token_ids == expected
        assert sequence not in refused
        assert EOS not in expected[:-1] or request.params.ignore_eos or request.params.min_new_tokens
