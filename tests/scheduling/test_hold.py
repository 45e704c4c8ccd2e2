"""Holding sequences back: none runs, or none that is added later; and scoring prompts again."""

from __future__ import annotations

import pytest

from fastgen_jax.scheduling import Request, SamplingParams, Scheduler


def scheduler(**options) -> Scheduler:
    settings = {"num_blocks": 16, "block_size": 4, "token_budget": 8, "max_num_seqs": 4, "max_context_len": 32}
    return Scheduler(**{**settings, "max_sample_rows": 4, **options})


def request(name: str, num_tokens: int = 6, **params) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple(range(num_tokens)),
        params=SamplingParams(**{"max_new_tokens": 3, **params}),
        seed=0,
    )


def run(s: Scheduler, num_steps: int = 100) -> None:
    for _ in range(num_steps):
        step = s.schedule()
        if step is None:
            return
        s.commit(step, [7] * len(step.sampled))


def test_nothing_runs_while_everything_is_held_and_blocks_stay():
    s = scheduler()
    assert not s.is_held
    sequence = s.add(request("a"))
    run(s, 1)
    blocks = list(sequence.block_ids)
    s.hold(only_new=False)
    s.add(request("b"))
    assert s.is_held
    assert s.is_paused
    assert s.schedule() is None
    assert sequence.block_ids == blocks
    s.release()
    assert not s.is_paused
    run(s)
    assert not s.has_work


def test_a_step_in_flight_is_committed_while_everything_is_held():
    s = scheduler()
    sequence = s.add(request("a"))
    step = s.schedule()
    assert step is not None
    s.hold(only_new=False)
    s.commit(step, [7] * len(step.sampled))
    assert sequence.output_token_ids == [7]


def test_earlier_sequences_finish_while_later_ones_wait_even_with_a_higher_priority():
    s = scheduler()
    early = [s.add(request(f"early {i}")) for i in range(6)]
    run(s, 1)
    s.hold(only_new=True)
    late = Request(request_id="late", prompt_token_ids=(1, 2), params=SamplingParams(max_new_tokens=1), seed=0, priority=-5)
    waiting = s.add(late)
    assert not s.is_paused
    run(s)
    assert s.is_paused
    assert all(sequence.is_finished for sequence in early)
    assert (waiting.num_computed, s.num_waiting, s.num_running) == (0, 1, 0)
    assert s.abort("late")
    s.add(request("later"))
    s.release()
    run(s)
    assert not s.has_work
    s.check_integrity()


def test_prompts_whose_log_probabilities_are_incomplete_are_scored_again():
    s = scheduler()
    scored = s.add(request("scored", 20, prompt_logprobs=0, prompt_logprobs_start=3))
    plain = s.add(request("plain", 2))
    assert scored.next_prompt_row == scored.first_prompt_row == 2
    run(s, 2)
    assert scored.next_prompt_row > 2
    assert s.score_prompts_again() == [scored]
    assert (scored.next_prompt_row, scored.num_computed, scored.slot) == (2, 0, None)
    assert plain.slot is not None
    s.check_integrity()
    run(s)
    assert scored.output_token_ids == plain.output_token_ids == [7] * 3


@pytest.mark.parametrize(("given", "first"), [(0, 0), (1, 0), (5, 4), (6, 5)])
def test_the_row_before_the_first_position_is_the_first_that_is_needed(given: int, first: int):
    sequence = scheduler().add(request("a", 6, prompt_logprobs=0, prompt_logprobs_start=given))
    assert sequence.first_row == first


def test_a_request_that_is_given_its_token_has_no_other():
    with pytest.raises(ValueError, match=r"max_new_tokens is 3; with a next_token_id it must be 1"):
        Request(request_id="a", prompt_token_ids=(1,), params=SamplingParams(max_new_tokens=3), seed=0, next_token_id=5)
    with pytest.raises(ValueError, match="next_token_id contains -1"):
        Request(request_id="a", prompt_token_ids=(1,), params=SamplingParams(max_new_tokens=1), seed=0, next_token_id=-1)
