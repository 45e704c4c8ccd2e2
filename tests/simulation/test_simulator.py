from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fastgen_jax.bench.loads import Load, LoadRequest, closed_loop, open_loop
from fastgen_jax.bench.metrics import effective_throughput, summarize_closed_loop
from fastgen_jax.scheduling import POLICIES, Promise
from fastgen_jax.simulation import ReplicaConfig, StepShape, simulate


def per_token(shape: StepShape) -> float:
    """A cost of one second per token."""
    return float(shape.num_tokens)


def config(**changes: Any) -> ReplicaConfig:
    arguments: dict[str, Any] = {
        "num_blocks": 400,
        "block_size": 4,
        "max_context_len": 400,
        "token_budget": 8,
        "max_num_seqs": 16,
        "overlap": False,
    }
    return ReplicaConfig(**(arguments | changes))


def load_of(*requests: tuple[float, int, int]) -> Load:
    """An open loop of (arrival, prompt tokens, output tokens)."""
    return Load(
        name="hand",
        requests=tuple(
            LoadRequest(request_id=f"r{i}", arrival=at, num_prompt_tokens=prompt, max_new_tokens=output)
            for i, (at, prompt, output) in enumerate(requests)
        ),
        facts={},
    )


def test_a_single_request_takes_the_time_of_its_steps() -> None:
    (request,) = simulate(load_of((2.0, 12, 3)), config(), per_token).requests
    # Steps of 8 and 4 prompt tokens, then two of one token; the first token arrives at the end of the prompt.
    assert (request.start, request.token_times) == (2.0, (14.0, 15.0, 16.0))


def test_two_requests_share_steps_as_the_policy_decides() -> None:
    result = simulate(load_of((0.0, 6, 3), (1.0, 10, 1)), config(), per_token, record_steps=True)
    first, second = result.requests
    # r1 arrives during the first step. Steps: r0's 6; r0 1 + r1 7; r0 1 + r1 3.
    assert first.token_times == (6.0, 14.0, 18.0)
    assert second.token_times == (18.0,)
    assert [step.chunks for step in result.steps[0]] == [
        (("r0", 0, 6),),
        (("r0", 6, 1), ("r1", 0, 7)),
        (("r0", 7, 1), ("r1", 7, 3)),
    ]
    assert result.busy_seconds == (18.0,)


def test_deterministic_chunks_depend_on_their_request_and_every_step_costs_as_much_as_a_full_one() -> None:
    fixed = config(deterministic=True, token_budget=8, max_num_seqs=2)
    assert fixed.chunk_size == 4
    result = simulate(load_of((0.0, 6, 3), (1.0, 10, 1)), fixed, per_token, record_steps=True)
    chunks = {name: [] for name in ("r0", "r1")}
    for step in result.steps[0]:
        assert step.end - step.start == 8.0
        for name, start, length in step.chunks:
            chunks[name].append((start, length))
    assert chunks == {"r0": [(0, 4), (4, 2), (6, 1), (7, 1)], "r1": [(0, 4), (4, 4), (8, 2)]}
    with pytest.raises(ValueError, match="max_num_seqs=16 sequences; choose at least 19, or a smaller max_num_seqs"):
        config(deterministic=True)


def test_with_overlap_the_host_works_while_the_device_runs() -> None:
    def ten(shape: StepShape) -> float:
        return 10.0

    load = load_of((0.0, 4, 5))
    alone = simulate(load, config(host_seconds=1.0), ten).requests[0]
    overlapped = simulate(load, config(host_seconds=1.0, overlap=True), ten).requests[0]
    assert alone.token_times == (11.0, 22.0, 33.0, 44.0, 55.0)
    assert overlapped.token_times == (11.0, 21.0, 31.0, 41.0, 51.0)


def test_a_request_that_arrives_during_a_step_waits_for_the_next_plan() -> None:
    load = load_of((0.0, 8, 4), (1.0, 4, 1))
    # With overlap the second step is planned when the first one starts, so r1 is in the third.
    steps = simulate(load, config(overlap=True), per_token, record_steps=True).steps[0]
    assert [[name for name, _, _ in step.chunks] for step in steps[:3]] == [["r0"], ["r0"], ["r0", "r1"]]
    steps = simulate(load, config(), per_token, record_steps=True).steps[0]
    assert [[name for name, _, _ in step.chunks] for step in steps[:2]] == [["r0"], ["r0", "r1"]]


def test_each_client_of_a_closed_loop_always_has_exactly_one_request() -> None:
    load = closed_loop(3, num_requests=20, mean_prompt=16, mean_output=6)
    result = simulate(load, config(), per_token)
    assert len(result.requests) == 20
    assert {r.request_id for r in result.requests} == {r.request_id for r in load.requests}
    events = sorted([(r.start, 1) for r in result.requests] + [(r.token_times[-1], -1) for r in result.requests])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    assert most == 3
    # Each client sends its next request the moment it is answered: all starts but the first three are ends.
    ends = Counter(r.token_times[-1] for r in result.requests)
    assert sum(r.start in ends for r in result.requests) == 17


def test_warm_up_requests_run_first_and_are_not_measured() -> None:
    load = closed_loop(2, num_requests=4, mean_prompt=16, mean_output=6)
    result = simulate(load, config(), per_token)
    warm_up = sum(r.num_prompt_tokens + r.max_new_tokens - 1 for r in load.warmup)
    assert min(r.start for r in result.requests) == pytest.approx(warm_up + min(load.stagger))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_load_gives_the_same_result_to_the_last_bit(policy: str) -> None:
    promise = Promise(prompt_rate=0.2, generation_rate=0.02) if policy == "sla" else None

    def run() -> str:
        load = open_loop(0.02, num_requests=60, mean_prompt=24, mean_output=6, gap_cv=2.0, seed=3)
        return repr(simulate(load, config(policy=policy, promise=promise), per_token, num_replicas=2))

    assert run() == run()


def test_equal_prefixes_are_computed_once() -> None:
    shared = tuple(range(5))
    requests = tuple(
        LoadRequest(
            request_id=f"r{i}", arrival=100.0 * i, num_prompt_tokens=42, max_new_tokens=2, prefix_blocks=(*shared, 100 + i)
        )
        for i in range(3)
    )
    load = Load(name="prefix", requests=requests, prefix_block_size=8, facts={})
    cached = simulate(load, config(prefix_caching=True), per_token)
    assert cached.num_prefix_hit_tokens == 2 * 40
    assert [r.time_to_first_token for r in cached.requests] == [42.0, 2.0, 2.0]
    assert simulate(load, config(), per_token).num_prefix_hit_tokens == 0


def test_requests_go_to_the_replica_with_the_fewest_tokens_outstanding() -> None:
    load = load_of((0.0, 80, 4), (1.0, 8, 4), (2.0, 8, 4), (3.0, 8, 4))
    result = simulate(load, config(), per_token, num_replicas=2, record_steps=True)
    served = [{name for step in steps for name, _, _ in step.chunks} for steps in result.steps]
    assert served == [{"r0"}, {"r1", "r2", "r3"}]


def test_four_replicas_serve_four_times_as_many_clients() -> None:
    def run(clients: int, replicas: int) -> float:
        load = closed_loop(clients, num_requests=60 * replicas, mean_prompt=24, mean_output=8)
        result = simulate(load, config(), per_token, num_replicas=replicas)
        return summarize_closed_loop(result.requests, num_clients=clients).throughput

    assert run(16, 4) == pytest.approx(4 * run(4, 1), rel=0.1)


def test_refused_requests_are_counted_and_their_clients_go_on() -> None:
    promise = Promise(prompt_rate=0.6, generation_rate=0.02)
    load = closed_loop(8, num_requests=40, mean_prompt=24, mean_output=8, warmup=0)
    result = simulate(load, config(policy="sla", promise=promise), per_token)
    assert result.refused
    assert len(result.requests) + len(result.refused) == 40
    for refusal in result.refused:
        # By the first plan after deadline and grace; the longest step takes 8 seconds.
        due = refusal.sent + refusal.num_prompt_tokens / promise.prompt_rate
        assert due + promise.grace < refusal.at <= due + promise.grace + 8


def test_under_overload_sla_has_a_higher_effective_throughput_than_first_come_first_served() -> None:
    load = open_loop(0.06, num_requests=150, mean_prompt=24, mean_output=6)  # 29 tokens each: 1.8 times capacity
    promise = Promise(prompt_rate=0.2, generation_rate=0.1)
    rates = {"tokens_per_second": promise.generation_rate, "prompt_rate": promise.prompt_rate}
    first_come = simulate(load, config(), per_token)
    sla = simulate(load, config(policy="sla", promise=promise), per_token)
    assert effective_throughput(sla.requests, **rates) > 2 * effective_throughput(first_come.requests, **rates)


def test_zero_replicas_are_rejected() -> None:
    with pytest.raises(ValueError, match="num_replicas is 0"):
        simulate(load_of((0.0, 4, 1)), config(), per_token, num_replicas=0)
