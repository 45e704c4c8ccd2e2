"""Properties of any workload, in any pool that can hold its longest request."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen_jax.scheduling import POLICIES, BlockGroups, Request, Scheduler
from tests.scheduling.fake_device import EOS, VOCAB, drive, make_request, naive_tokens, with_promise

ANY_WORKLOAD = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WINDOWS = st.sampled_from([(None,), (None,), (None, 3), (None, 16, 16), (5,), (None, 1, 7), (9, 2)])
"""Sliding windows of cache groups; most models have a single group."""


class Workload(NamedTuple):
    """A scheduler's arguments, and the requests and aborts by step number."""

    arguments: dict[str, Any]
    arrivals: dict[int, list[Request]]
    aborts: dict[int, list[str]]

    @property
    def requests(self) -> list[Request]:
        return [request for requests in self.arrivals.values() for request in requests]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    block_size = draw(st.one_of(st.integers(1, 5), st.sampled_from([8, 16, 32])))
    max_context_len = draw(st.sampled_from([40, 40, 150]))
    longest_output = max_context_len // 3 + 1
    groups = BlockGroups(windows=draw(WINDOWS), block_size=block_size, token_budget=integer(1, 48))
    arrivals: dict[int, list[Request]] = {}
    aborts: dict[int, list[str]] = {}
    needed = 1
    for index in range(integer(1, 9)):
        # A vocabulary of two and few seeds: many prompts share a prefix, and some their continuation.
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=max_context_len * 3 // 5))
        max_new_tokens = integer(1, longest_output)
        request = make_request(
            index,
            prompt,
            max_new_tokens,
            min_new_tokens=integer(0, max_new_tokens // 2),
            ignore_eos=draw(st.booleans()),
            eos_token_ids=(EOS,),
            stop_token_ids=draw(st.sampled_from([(), (VOCAB - 2,)])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
            priority=integer(0, 1),
            arrival_time=float(integer(0, 3)),
            seed_number=integer(0, 2),
        )
        time = integer(0, 12)
        arrivals.setdefault(time, []).append(request)
        if draw(st.integers(0, 4)) == 0:
            aborts.setdefault(time + integer(0, 10), []).append(request.request_id)
        needed = max(needed, groups.blocks_needed(len(prompt) + max_new_tokens))
    arguments = {
        "num_blocks": needed + integer(0, 12),
        "block_size": block_size,
        "windows": groups.windows,
        "token_budget": groups.token_budget,
        "max_num_seqs": integer(1, 6),
        "max_context_len": max_context_len,
        "max_sample_rows": integer(1, 8),
        "prefix_caching": draw(st.booleans()),
        "watermark_blocks": integer(0, 3),
        "max_bypasses": integer(0, 3),
    }
    return Workload(arguments, arrivals, aborts)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", POLICIES)
@given(workload=workloads())
@ANY_WORKLOAD
def test_any_workload_generates_the_tokens_of_each_request_alone(policy: str, depth: int, workload: Workload) -> None:
    scheduler = Scheduler(**with_promise(policy), **workload.arguments)
    run = drive(scheduler, workload.arrivals, depth=depth, aborts=workload.aborts)
    for request in workload.requests:
        sequence = run.sequences[request.request_id]
        expected = naive_tokens(request, scheduler.max_context_len)
        if sequence.finish_reason == "abort":
            assert sequence.output_token_ids == expected[: len(sequence.output_token_ids)]
        else:
            assert sequence.output_token_ids == expected
            stops = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else (EOS,))}
            stopped = expected[-1] in stops and len(expected) > request.params.min_new_tokens
            assert sequence.finish_reason == ("stop" if stopped else "length")
    for sequence, count in run.bypasses.items():
        assert sequence.num_bypasses == count


@given(workload=workloads())
@ANY_WORKLOAD
def test_without_bypass_requests_are_first_admitted_in_order(workload: Workload) -> None:
    arguments: dict[str, Any] = workload.arguments | {"max_bypasses": 0}
    run = drive(Scheduler(**arguments), {0: workload.requests})
    # A preempted sequence is admitted again; the dict keeps its first admission.
    admitted = list(dict.fromkeys(sequence.order for step in run.steps for sequence in step.admitted))
    assert admitted == sorted(admitted)


@given(workload=workloads())
@ANY_WORKLOAD
def test_with_room_for_all_every_splitfuse_step_is_full_while_prompts_wait(workload: Workload) -> None:
    room: dict[str, Any] = {
        "num_blocks": 5000,
        "max_num_seqs": 9,
        "max_sample_rows": 500,
        "prefix_caching": False,
    }
    scheduler = Scheduler(**(workload.arguments | room))
    for request in workload.requests:
        scheduler.add(request)
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None
        left = [s for s in (*scheduler._state.running, *scheduler._state.waiting) if s.num_computed < s.num_prompt_tokens]
        assert step.num_tokens == scheduler.limits.token_budget or not left
        scheduler.commit(step, [0] * len(step.sampled))


@given(workload=workloads(), longer=st.integers(1, 100))
@ANY_WORKLOAD
def test_a_rejected_request_changes_nothing(workload: Workload, longer: int) -> None:
    limit = workload.arguments["max_context_len"]
    refused = [
        (make_request("long prompt", [0] * (limit + longer)), "has .* tokens but max_context_len"),
        (make_request("length", [0] * 5, None, max_length=5), "max_length is 5"),
        (make_request("minimum", [0] * (limit - 10), None, min_new_tokens=11), "min_new_tokens is 11|shorten the prompt"),
        (workload.requests[0], "already in use"),
    ]

    def serve(disturb: bool) -> list[list[tuple[str, int, int]]]:
        scheduler = Scheduler(**workload.arguments)
        for request in workload.requests:
            scheduler.add(request)
            if disturb:
                for bad, message in refused:
                    with pytest.raises(ValueError, match=message):
                        scheduler.add(bad)
        log = []
        while scheduler.has_work:
            step = scheduler.schedule()
            assert step is not None
            log.append([(c.sequence.request_id, c.start, c.length) for c in step.chunks])
            scheduler.commit(step, [0] * len(step.sampled))
        return log

    assert serve(disturb=True) == serve(disturb=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_workload_gives_the_same_steps(policy: str) -> None:
    def serve() -> list[list[tuple[str, int, int]]]:
        scheduler = Scheduler(
            **with_promise(policy),
            num_blocks=14,
            block_size=3,
            token_budget=11,
            max_num_seqs=5,
            max_context_len=40,
            max_sample_rows=5,
        )
        requests = [make_request(i, [i % 3] * (2 + 5 * i % 23), 9, seed_number=i) for i in range(12)]
        run = drive(scheduler, {0: requests[:6], 4: requests[6:]}, depth=1)
        return [[(c.sequence.request_id, c.start, c.length) for c in step.chunks] for step in run.steps]

    assert serve() == serve()
