"""Policies that users provide: which functions are accepted, and that no invalid plan is executed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given

from fastgen_jax.scheduling import Admission, Chunk, Planner, Prefix, Scheduler, StepPlan, orca, prompts_first, splitfuse
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


def last_come_first_served(planner: Planner) -> StepPlan:
    planner.waiting = planner.waiting[::-1]
    planner.generate()
    planner.continue_prompts()
    planner.admit()
    return planner.finish()._replace(bypassed=[])


def one_by_one(planner: Planner) -> StepPlan:
    """SplitFuse without bypass, built from operations on single sequences."""
    for sequence in planner.running:
        planner.take(sequence)
    for sequence in planner.waiting:
        if not planner.take(sequence):
            break
    return planner.finish()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("policy", [splitfuse, prompts_first, orca])
@given(workload=workloads())
@ANY_WORKLOAD
def test_every_plan_of_a_built_in_policy_passes_the_check(policy: Any, depth: int, workload: Workload) -> None:
    scheduler = Scheduler(**workload.arguments, policy=partial(policy))
    run = drive(scheduler, workload.arrivals, depth=depth, aborts=workload.aborts)
    for request in workload.requests:
        sequence = run.sequences[request.request_id]
        assert sequence.finish_reason == "abort" or sequence.output_token_ids == naive_tokens(
            request, scheduler.max_context_len
        )


def test_a_user_policy_decides_which_sequences_run() -> None:
    scheduler = Scheduler(**SIZES, policy=last_come_first_served, prefix_caching=False)
    sequences = [scheduler.add(make_request(name, range(16), 1)) for name in "abc"]
    order = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step is not None
        order += [chunk.sequence for chunk in step.chunks]
        scheduler.commit(step, [0])
    assert order == sequences[::-1]


def test_a_built_in_policy_is_the_same_by_name_and_as_a_function() -> None:
    assert Scheduler(**SIZES, policy=orca)._policy is Scheduler(**SIZES, policy="orca")._policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda running, waiting: None, "cannot be called with a planner: missing a required argument: 'waiting'"),
        (lambda: None, "cannot be called with a planner: too many positional arguments"),
        (17, "policy is 17; choose one of 'splitfuse'"),
        (None, "policy is None"),
    ],
)
def test_a_function_that_cannot_be_called_with_a_planner_is_rejected(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(**SIZES, policy=policy)


def plan_of(**parts: Any) -> StepPlan:
    return StepPlan([], [], [], [], [])._replace(**parts)


def chunk(sequence: Any, **changes: Any) -> Chunk:
    return Chunk(sequence, 0, 8, 1, True)._replace(**changes)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda a, b: None, "returned NoneType, not a StepPlan"),
        (lambda a, b: plan_of(chunks=[chunk(a)]), "does not run in this step"),
        (lambda a, b: plan_of(admissions=[Admission(a, Prefix())]), "admitted without a chunk"),
        (lambda a, b: plan_of(chunks=[chunk(a), chunk(a)], admissions=[Admission(a, Prefix())]), "has another chunk"),
        (lambda a, b: plan_of(chunks=[chunk(a)], admissions=[Admission(a, Prefix()), Admission(a, Prefix())]), "one twice"),
        (
            lambda a, b: plan_of(chunks=[chunk(a, start=4, length=4)], admissions=[Admission(a, Prefix())]),
            r"must begin at 0",
        ),
        (lambda a, b: plan_of(chunks=[chunk(a, length=9)], admissions=[Admission(a, Prefix())]), r"is \[0, 9\)"),
        (lambda a, b: plan_of(chunks=[chunk(a, length=0)], admissions=[Admission(a, Prefix())]), r"is \[0, 0\)"),
        (
            lambda a, b: plan_of(chunks=[chunk(a, num_sample_rows=0)], admissions=[Admission(a, Prefix())]),
            "num_sample_rows=0",
        ),
        (lambda a, b: plan_of(chunks=[chunk(a, length=4)], admissions=[Admission(a, Prefix())]), "must have 0 and False"),
        (lambda a, b: plan_of(preempted=[a]), "preempted names a sequence that does not run"),
        (lambda a, b: plan_of(refused=[a, a]), "refused names"),
        (lambda a, b: plan_of(chunks=[chunk(a)], admissions=[Admission(a, Prefix())], bypassed=[a]), "bypassed names"),
        (
            lambda a, b: plan_of(chunks=[chunk(b, length=40)], admissions=[Admission(b, Prefix())]),
            "has 40 tokens and 1 rows of logits",
        ),
    ],
)
def test_an_invalid_plan_is_rejected_with_the_reason_and_changes_nothing(plan: Any, message: str) -> None:
    sequences: list[Any] = []

    def policy(planner: Planner) -> StepPlan:
        return plan(*sequences)

    scheduler = Scheduler(**SIZES, policy=policy)
    sequences += [scheduler.add(make_request("a", range(8), 4)), scheduler.add(make_request("b", range(40), 4))]
    with pytest.raises(RuntimeError, match=message):
        scheduler.schedule()
    scheduler.check_integrity()
    assert scheduler.num_waiting == 2
    assert scheduler.num_free_blocks == SIZES["num_blocks"]


def test_a_plan_that_needs_more_blocks_than_are_free_is_rejected() -> None:
    def greedy(planner: Planner) -> StepPlan:
        waiting = planner.waiting
        return plan_of(chunks=[chunk(s) for s in waiting], admissions=[Admission(s, Prefix()) for s in waiting])

    scheduler = Scheduler(**{**SIZES, "num_blocks": 4}, policy=greedy)
    scheduler.borrow_blocks(1)
    for name in "ab":
        scheduler.add(make_request(name, range(8), 4))
    with pytest.raises(RuntimeError, match="needs 1 more KV blocks than are free"):
        scheduler.schedule()


def test_a_policy_cannot_change_the_queues_or_the_block_count_of_the_scheduler() -> None:
    def meddling(planner: Planner) -> StepPlan:
        for queue in (planner.running, planner.waiting):
            with pytest.raises(AttributeError):
                queue.reverse()  # type: ignore[attr-defined]
        plan = splitfuse(planner)
        planner.blocks.take(planner.free_blocks)
        planner.waiting = planner.running = ()
        return plan

    scheduler = Scheduler(**SIZES, policy=meddling)
    sequences = [scheduler.add(make_request(name, range(8), 4)) for name in "abc"]
    step = scheduler.schedule()
    assert step is not None
    assert [chunk.sequence for chunk in step.chunks] == sequences[:2]
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_free_blocks) == (2, 1, SIZES["num_blocks"] - 4)


@pytest.mark.parametrize("depth", [0, 1, 2])
@given(workload=workloads())
@ANY_WORKLOAD
def test_a_policy_built_from_single_sequences_generates_the_tokens_of_each_request_alone(
    depth: int, workload: Workload
) -> None:
    scheduler = Scheduler(**workload.arguments, policy=one_by_one)
    run = drive(scheduler, workload.arrivals, depth=depth, aborts=workload.aborts)
    for request in workload.requests:
        sequence = run.sequences[request.request_id]
        assert sequence.finish_reason == "abort" or sequence.output_token_ids == naive_tokens(
            request, scheduler.max_context_len
        )


def test_fits_says_whether_take_would_complete_a_sequence() -> None:
    answers: list[list[bool]] = []

    def asking(planner: Planner) -> StepPlan:
        answers.append([planner.fits(sequence) for sequence in (*planner.running, *planner.waiting)])
        return splitfuse(planner)

    scheduler = Scheduler(**{**SIZES, "num_blocks": 6}, policy=asking)
    for name, length in (("a", 8), ("b", 20)):
        scheduler.add(make_request(name, range(length), 1))
    for _ in range(2):
        step = scheduler.schedule()
        assert step is not None
        scheduler.commit(step, [0] * len(step.sampled))
    # a fits and b exceeds the 16 tokens of a step; then a has ended, and the 12 tokens that b has left fit.
    assert answers == [[True, False], [True]]


def test_a_policy_reads_the_clock_of_the_scheduler() -> None:
    times: list[float] = []

    def timed(planner: Planner) -> StepPlan:
        times.append(planner.now())
        return splitfuse(planner)

    scheduler = Scheduler(**SIZES, policy=timed, clock=lambda: 12.5)
    scheduler.add(make_request("a", range(4), 1))
    scheduler.schedule()
    assert times == [12.5]
