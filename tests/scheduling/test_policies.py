"""What each policy puts into a step, and how memory, slots and rows of logits are shared."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastgen_jax.scheduling
from fastgen_jax.scheduling import POLICIES, Scheduler, Step
from tests.scheduling.fake_device import drive, make_request, naive_tokens, with_promise


def make_scheduler(**changes: Any) -> Scheduler:
    arguments: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "token_budget": 8,
        "max_num_seqs": 4,
        "max_context_len": 100,
        "max_sample_rows": 4,
        "prefix_caching": False,
        "watermark_blocks": 0,
    }
    return Scheduler(**(arguments | changes))


def shape(step: Step | None) -> list[tuple[str, int, int, int]]:
    """The chunks of a step as (request id, start, length, sampled rows)."""
    assert step is not None
    return [(c.sequence.request_id, c.start, c.length, c.num_sample_rows) for c in step.chunks]


def shapes(scheduler: Scheduler, count: int) -> list[list[tuple[str, int, int, int]]]:
    """Runs `count` steps."""
    result = []
    for _ in range(count):
        step = scheduler.schedule()
        result.append(shape(step))
        assert step is not None
        scheduler.commit(step, [0] * len(step.sampled))
    return result


def test_splitfuse_splits_prompts_so_that_every_step_is_exactly_full() -> None:
    scheduler = make_scheduler()
    for name, length in (("a", 5), ("b", 12), ("c", 6)):
        scheduler.add(make_request(name, range(length), 20))
    assert shapes(scheduler, 4) == [
        [("a", 0, 5, 1), ("b", 0, 3, 0)],
        [("a", 5, 1, 1), ("b", 3, 7, 0)],
        [("a", 6, 1, 1), ("b", 10, 2, 1), ("c", 0, 5, 0)],
        [("a", 7, 1, 1), ("b", 12, 1, 1), ("c", 5, 1, 1)],
    ]


def test_prompts_first_runs_whole_prompts_or_generation_but_never_both() -> None:
    scheduler = make_scheduler(policy="prompts_first")
    for name, length in (("a", 5), ("b", 3), ("c", 6)):
        scheduler.add(make_request(name, range(length), 20))
    assert shapes(scheduler, 3) == [
        [("a", 0, 5, 1), ("b", 0, 3, 1)],
        [("c", 0, 6, 1)],
        [("a", 5, 1, 1), ("b", 3, 1, 1), ("c", 6, 1, 1)],
    ]


def test_orca_runs_whole_prompts_next_to_generation() -> None:
    scheduler = make_scheduler(policy="orca")
    for name, length in (("a", 5), ("b", 4), ("c", 4)):
        scheduler.add(make_request(name, range(length), 20))
    assert shapes(scheduler, 3) == [
        [("a", 0, 5, 1)],
        [("a", 5, 1, 1), ("b", 0, 4, 1)],
        [("a", 6, 1, 1), ("b", 4, 1, 1), ("c", 0, 4, 1)],
    ]


@pytest.mark.parametrize("policy", ["prompts_first", "orca"])
def test_a_prompt_longer_than_a_step_runs_alone_in_consecutive_steps(policy: str) -> None:
    scheduler = make_scheduler(policy=policy)
    scheduler.add(make_request("a", range(3), 20))
    shapes(scheduler, 1)
    scheduler.add(make_request("long", range(18), 20))
    scheduler.add(make_request("b", range(2), 20))
    assert shapes(scheduler, 3) == [[("long", 0, 8, 0)], [("long", 8, 8, 0)], [("long", 16, 2, 1)]]


def test_lower_priority_numbers_run_first_then_earlier_arrivals() -> None:
    scheduler = make_scheduler(token_budget=3)
    scheduler.add(make_request("late", [0], arrival_time=2.0))
    scheduler.add(make_request("early", [0], arrival_time=1.0))
    scheduler.add(make_request("urgent", [0], arrival_time=3.0, priority=-1))
    assert [chunk[0] for chunk in shapes(scheduler, 1)[0]] == ["urgent", "early", "late"]


def test_prompt_logprobs_need_a_row_per_prompt_token_and_split_the_prompt_by_rows() -> None:
    scheduler = make_scheduler(max_sample_rows=3, prefix_caching=True)
    scheduler.add(make_request("first", range(8), 1))
    shapes(scheduler, 1)
    scheduler.add(make_request("a", range(8), 9, prompt_logprobs=0))
    assert shapes(scheduler, 4) == [[("a", 0, 3, 3)], [("a", 3, 3, 3)], [("a", 6, 2, 2)], [("a", 8, 1, 1)]]


def test_a_prompt_is_completed_only_if_a_row_of_logits_is_left() -> None:
    scheduler = make_scheduler(max_sample_rows=1)
    scheduler.add(make_request("a", range(3), 3))
    scheduler.add(make_request("b", range(3), 3))
    assert shapes(scheduler, 2) == [[("a", 0, 3, 1), ("b", 0, 2, 0)], [("a", 3, 1, 1)]]


def test_a_big_prompt_is_bypassed_a_bounded_number_of_times() -> None:
    scheduler = make_scheduler(num_blocks=10, block_size=1, max_num_seqs=8, max_sample_rows=8, max_bypasses=3)
    scheduler.add(make_request("running", range(3), 7))
    shapes(scheduler, 1)
    big = scheduler.add(make_request("big", range(8), 1))
    # The 7 tokens that the budget leaves do not fit next to the 4 of "running"; each small request needs 1 block.
    smalls = [scheduler.add(make_request(i, [i], 1)) for i in range(6)]
    admitted = []
    while not big.is_finished:
        step = scheduler.schedule()
        assert step is not None
        admitted += [sequence.request_id for sequence in step.admitted]
        scheduler.commit(step, [0] * len(step.sampled))
    assert admitted.index("big") == 3
    assert big.num_bypasses == scheduler.stats.num_bypasses == 3
    assert sum(small.is_finished for small in smalls) >= 3


def test_a_preempted_sequence_is_readmitted_when_all_of_it_fits_and_is_not_preempted_again() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=1)
    requests = [make_request("steady", range(4), 14), make_request("victim", range(14), 2)]
    run = drive(scheduler, {0: requests})
    assert run.sequences["victim"].num_preemptions == 1
    resumed = next(i for i, step in enumerate(run.steps) if i > 1 and run.sequences["victim"] in step.admitted)
    last_of_steady = max(i for i, step in enumerate(run.steps) if run.sequences["steady"] in step.sampled)
    assert resumed > last_of_steady


@pytest.mark.parametrize("policy", POLICIES)
def test_running_prompts_that_hold_all_blocks_are_preempted_for_the_first(policy: str) -> None:
    # "a" is split by its rows of logits, so "b", which precedes it in the queue, starts next to it; together they
    # fill the pool while both have more than one token left to compute.
    scheduler = make_scheduler(num_blocks=10, block_size=1, token_budget=4, max_sample_rows=1, **with_promise(policy))
    a = make_request("a", range(9), 1, prompt_logprobs=0, priority=1)
    b = make_request("b", range(9), 1)
    run = drive(scheduler, {0: [a], 2: [b]})
    assert run.sequences["b"].num_preemptions == 0
    assert run.sequences["a"].num_preemptions == (1 if policy in ("splitfuse", "sla") else 0)


def test_the_watermark_stays_free_when_a_sequence_is_admitted_next_to_others() -> None:
    scheduler = make_scheduler(num_blocks=6, watermark_blocks=2)
    scheduler.add(make_request("a", range(8), 4))
    shapes(scheduler, 1)
    scheduler.add(make_request("b", range(7), 4))
    assert [chunk[0] for chunk in shapes(scheduler, 1)[0]] == ["a"], "1 block for a, 2 for b would leave 1"
    relaxed = make_scheduler(num_blocks=6, watermark_blocks=1)
    relaxed.add(make_request("a", range(8), 4))
    shapes(relaxed, 1)
    relaxed.add(make_request("b", range(7), 4))
    assert [chunk[0] for chunk in shapes(relaxed, 1)[0]] == ["a", "b"]


@pytest.mark.parametrize("policy", POLICIES)
def test_preemption_loses_no_token_and_the_first_sequence_is_never_preempted(policy: str) -> None:
    scheduler = make_scheduler(num_blocks=8, token_budget=16, **with_promise(policy))
    requests = [make_request(i, [i] * 6, 20, seed_number=i) for i in range(4)]
    run = drive(scheduler, {0: requests}, depth=1)
    assert scheduler.stats.num_preemptions > 0
    assert run.sequences["0"].num_preemptions == 0
    for request in requests:
        assert run.sequences[request.request_id].output_token_ids == naive_tokens(request, 100)


def test_a_long_queue_without_room_is_not_searched_to_its_end() -> None:
    examined = []
    scheduler = make_scheduler(num_blocks=8, max_bypasses=1000)
    scheduler.add(make_request("a", range(8), 20))
    shapes(scheduler, 1)
    for i in range(100):
        scheduler.add(make_request(i, range(30), 2))
    prefix = scheduler._cached_prefix
    scheduler._cached_prefix = lambda sequence: examined.append(sequence) or prefix(sequence)  # type: ignore[method-assign]
    scheduler.limits = replace(scheduler.limits, watermark_blocks=7)
    shapes(scheduler, 1)
    assert 0 < len(examined) < 20


def test_scheduling_imports_only_the_standard_library() -> None:
    package = Path(fastgen_jax.scheduling.__file__).parent
    names = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    foreign = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("fastgen_jax.scheduling")} == set()
