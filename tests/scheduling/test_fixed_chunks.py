"""Fixed chunks: where a request is cut depends on the request alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.scheduling import Scheduler
from tests.scheduling.fake_device import drive, make_request, naive_tokens
from tests.scheduling.test_properties import ANY_WORKLOAD, Workload, workloads

SIZES: dict[str, Any] = {"num_blocks": 40, "block_size": 2, "token_budget": 12, "max_num_seqs": 4} | {
    "max_context_len": 40,
    "max_sample_rows": 4,
}
POLICIES = ("splitfuse", "prompts_first", "orca")


def in_fixed_chunks(workload: Workload, blocks: int, **options: Any) -> Scheduler:
    arguments = workload.arguments
    size = blocks * arguments["block_size"]
    room = max(arguments["token_budget"], size + arguments["max_num_seqs"] - 1)
    # With a larger step a sequence holds more blocks of a window.
    more = len(arguments["windows"]) * (1 + -(-(room - arguments["token_budget"]) // arguments["block_size"]))
    sizes = {"token_budget": room, "num_blocks": arguments["num_blocks"] + more, "chunk_size": size}
    return Scheduler(**{**arguments, **sizes, **options})


def chunks_of(run, request_id: str) -> set[tuple[int, int]]:
    return {(c.start, c.length) for step in run.steps for c in step.chunks if c.sequence.request_id == request_id}


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("policy", POLICIES)
@given(workload=workloads(), blocks=st.integers(1, 3))
@ANY_WORKLOAD
def test_other_requests_preemption_and_cached_prefixes_move_no_border(
    policy: str, depth: int, workload: Workload, blocks: int
) -> None:
    run = drive(in_fixed_chunks(workload, blocks, policy=policy), workload.arrivals, depth=depth, aborts=workload.aborts)
    for request in workload.requests:
        alone = drive(in_fixed_chunks(workload, blocks, prefix_caching=False), {0: [request]}, depth=depth)
        among_others = chunks_of(run, request.request_id)
        assert among_others <= chunks_of(alone, request.request_id)
        sequence = run.sequences[request.request_id]
        if sequence.finish_reason != "abort":
            assert sequence.output_token_ids == naive_tokens(request, workload.arguments["max_context_len"])


def test_a_prompt_is_cut_at_multiples_and_followed_by_single_tokens() -> None:
    run = drive(Scheduler(**SIZES, chunk_size=8), {0: [make_request(0, [0, 1] * 9 + [1], 3)]})
    assert sorted(chunks_of(run, run.steps[0].chunks[0].sequence.request_id)) == [(0, 8), (8, 8), (16, 3), (19, 1), (20, 1)]


def test_only_whole_chunks_of_prompts_are_shared() -> None:
    first = make_request(0, [0, 1, 0, 1, 1, 1], 6)
    again = make_request(1, [*first.prompt_token_ids, *naive_tokens(first, 40)], 2)
    cached = {}
    for size in (None, 4):
        run = drive(Scheduler(**SIZES, chunk_size=size), {0: [first], 20: [again]})
        cached[size] = run.sequences["1"].num_cached
    assert cached == {None: 10, 4: 4}


def test_a_prompt_whose_log_probabilities_are_needed_is_computed_token_by_token() -> None:
    run = drive(Scheduler(**SIZES, chunk_size=8), {0: [make_request(0, [0] * 6, 2, prompt_logprobs=0)]})
    assert {c.length for step in run.steps for c in step.chunks} == {1}


def test_a_plan_with_another_border_is_refused() -> None:
    def halves(planner):
        planner.tokens_left = 4
        planner.limits = type(planner.limits)(
            **{**{n: getattr(planner.limits, n) for n in planner.limits.__slots__}, "chunk_size": None}
        )
        planner.admit()
        return planner.finish()

    scheduler = Scheduler(**SIZES, chunk_size=8, policy=halves)
    scheduler.add(make_request(0, [0] * 8, 2))
    with pytest.raises(RuntimeError, match="with chunks of a fixed size it must end at 8"):
        scheduler.schedule()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 3}, "a multiple of block_size=2"),
        ({"chunk_size": 10}, "need steps of 13 tokens, but token_budget is 12"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(**SIZES, **options)
