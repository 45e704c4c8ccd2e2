from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastgen_jax.bench.workloads import (
    STANDARD,
    make_workload,
    sample_lengths,
    standard_workload,
    warmup_workload,
    with_text,
)

VOCAB = 49152


def test_a_standard_workload_is_reproducible() -> None:
    w1 = standard_workload("W1", vocab_size=VOCAB)
    assert (len(w1.requests), w1.num_prompt_tokens, w1.num_output_tokens) == (32, 8477, 1912)
    assert w1 == standard_workload("W1", vocab_size=VOCAB)


@pytest.mark.parametrize(("name", "requests", "prompt", "output"), [("W2", 1, 128, 128), ("W3", 8, 1000, 32)])
def test_workloads_without_spread_have_equal_requests(name: str, requests: int, prompt: int, output: int) -> None:
    workload = standard_workload(name, vocab_size=VOCAB)
    lengths = [(len(r.prompt_token_ids), r.max_new_tokens) for r in workload.requests]
    assert lengths == [(prompt, output)] * requests
    assert workload.longest_context == prompt + output


def test_another_vocabulary_changes_ids_but_not_lengths() -> None:
    small, large = (standard_workload("W1", vocab_size=size) for size in (1000, VOCAB))
    sizes = [[(len(r.prompt_token_ids), r.max_new_tokens) for r in w.requests] for w in (small, large)]
    assert sizes[0] == sizes[1]
    assert max(max(r.prompt_token_ids) for r in small.requests) < 1000


def test_reserved_ids_are_never_drawn() -> None:
    workload = make_workload("w", num_requests=4, mean_prompt=200, mean_output=4, vocab_size=64, num_reserved_ids=60)
    assert {i for r in workload.requests for i in r.prompt_token_ids} == {60, 61, 62, 63}


def test_another_seed_gives_another_workload() -> None:
    assert standard_workload("W1", vocab_size=VOCAB) != standard_workload("W1", vocab_size=VOCAB, seed=1)


def test_max_prompt_truncates_long_prompts() -> None:
    workload = make_workload("w", num_requests=16, mean_prompt=100, mean_output=4, vocab_size=999, max_prompt=90)
    assert max(len(r.prompt_token_ids) for r in workload.requests) == 90


def test_lengths_are_truncated_normal_draws_of_at_least_four() -> None:
    expected = np.random.default_rng(7).normal(10, 10, 500)
    lengths = sample_lengths(10, 500, spread=1.0, rng=np.random.default_rng(7))
    assert lengths == [max(4, int(draw)) for draw in expected]
    assert 4 in lengths


def test_a_mean_below_the_minimum_length_is_respected() -> None:
    assert set(sample_lengths(1, 50, spread=0.3, rng=np.random.default_rng(0))) == {1}


def test_a_warm_up_has_the_same_lengths_but_other_prompts() -> None:
    workload = standard_workload("W1", vocab_size=VOCAB)
    warmup = warmup_workload(workload, vocab_size=VOCAB)
    for ours, theirs in zip(warmup.requests, workload.requests, strict=True):
        assert (len(ours.prompt_token_ids), ours.max_new_tokens) == (
            len(theirs.prompt_token_ids),
            theirs.max_new_tokens,
        )
        assert ours.prompt_token_ids != theirs.prompt_token_ids


def test_prompts_from_a_text_keep_their_lengths_and_are_pieces_of_it() -> None:
    workload = make_workload("w", num_requests=5, mean_prompt=20, mean_output=4, vocab_size=999)
    text = list(range(5000, 5100))
    real = with_text(workload, prompt_ids=text)
    for before, after in zip(workload.requests, real.requests, strict=True):
        start = after.prompt_token_ids[0] - 5000
        assert list(after.prompt_token_ids) == text[start : start + len(before.prompt_token_ids)]
        assert len(after.prompt_token_ids) == len(before.prompt_token_ids)


def test_a_text_shorter_than_the_longest_prompt_is_rejected() -> None:
    with pytest.raises(ValueError, match="the text has 5 tokens but the longest prompt has 1000"):
        with_text(standard_workload("W3", vocab_size=VOCAB), prompt_ids=[1, 2, 3, 4, 5])


def test_an_unknown_workload_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"workload is 'W9'; choose one of W1, W2"):
        standard_workload("W9", vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_requests": 0}, "num_requests is 0"),
        ({"mean_prompt": 0}, "mean length is 0 tokens"),
        ({"spread": -0.1}, "spread is -0.1"),
        ({"num_reserved_ids": 100}, "num_reserved_ids is 100 but vocab_size is 100; use 0 to 99"),
    ],
)
def test_invalid_sizes_are_rejected(change: dict[str, float], message: str) -> None:
    sizes: dict[str, Any] = {
        "num_requests": 1,
        "mean_prompt": 8,
        "mean_output": 8,
        "vocab_size": 100,
        "num_reserved_ids": 10,
    }
    with pytest.raises(ValueError, match=message):
        make_workload("w", **{**sizes, **change})


def test_every_standard_workload_fits_its_description() -> None:
    for name, shape in STANDARD.items():
        workload = standard_workload(name, vocab_size=VOCAB)
        assert len(workload.requests) == shape.num_requests
        assert len({r.request_id for r in workload.requests}) == shape.num_requests
        # 32 draws with a standard deviation of 0.3 means: their mean is within 4 * 0.3 / sqrt(32) = 0.21 of it.
        mean = workload.num_prompt_tokens / shape.num_requests
        assert abs(mean - shape.mean_prompt) <= 0.21 * shape.mean_prompt
