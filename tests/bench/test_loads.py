from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastgen_jax.bench.loads import closed_loop, offered_rate, open_loop, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,9000,55
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 1200, "output_length": 0, "hash_ids": [0, 1, 9]}
"""


def test_a_closed_loop_has_the_lengths_of_fastgen() -> None:
    load = closed_loop(4, num_requests=512, mean_prompt=2600, mean_output=60)
    assert (len(load.requests), len(load.warmup), len(load.stagger)) == (512, 4, 4)
    draws = np.random.default_rng(42).normal(2600, 780, 516)
    assert [r.num_prompt_tokens for r in load.requests] == [min(4000, int(d)) for d in draws[:512]]
    assert max(r.num_prompt_tokens for r in load.requests) == 4000
    assert all(0 <= wait <= 0.04 for wait in load.stagger)


def test_scaled_lengths_keep_their_proportions() -> None:
    whole = closed_loop(2, num_requests=200, mean_prompt=2600, mean_output=60)
    fifth = closed_loop(2, num_requests=200, mean_prompt=2600, mean_output=60, length_scale=0.2)
    for one, other in zip(whole.requests, fifth.requests, strict=True):
        assert abs(other.num_prompt_tokens - 0.2 * one.num_prompt_tokens) <= 1
    assert max(r.num_prompt_tokens for r in fifth.requests) == 800


@pytest.mark.parametrize("gap_cv", [1.0, 3.0])
def test_an_open_loop_has_the_requested_rate_and_variation(gap_cv: float) -> None:
    load = open_loop(4.0, num_requests=20_000, mean_prompt=8, mean_output=8, gap_cv=gap_cv)
    gaps = np.diff([r.arrival for r in load.requests])
    # The relative error of the mean of n gaps is cv / sqrt(n): 2% for the larger variation; four times that is safe.
    assert offered_rate(load.requests) == pytest.approx(4.0, rel=0.09)
    assert gaps.std() / gaps.mean() == pytest.approx(gap_cv, rel=0.1)


def test_an_azure_trace_is_read_with_its_arrival_times(tmp_path: Path) -> None:
    (tmp_path / "azure.csv").write_text(AZURE)
    load = read_trace(tmp_path / "azure.csv", speed=2.0, max_context_len=4096)
    assert [r.arrival for r in load.requests] == pytest.approx([0, 4.314579 / 2, 4.541877 / 2])
    assert [(r.num_prompt_tokens, r.max_new_tokens) for r in load.requests] == [(374, 44), (396, 109), (4041, 55)]


def test_a_mooncake_trace_shares_prefixes_where_hashes_are_equal(tmp_path: Path) -> None:
    (tmp_path / "mooncake.jsonl").write_text(MOONCAKE)
    load = read_trace(tmp_path / "mooncake.jsonl", length_scale=0.5)
    first, second = (load.prompt_ids(r, vocab_size=1000) for r in load.requests)
    assert (len(first), len(second), load.prefix_block_size) == (550, 600, 256)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:550]
    assert load.requests[1].arrival == pytest.approx(3.052)
    assert load.requests[1].max_new_tokens == 1


def test_prompts_of_different_requests_differ_and_are_reproducible() -> None:
    load = closed_loop(1, num_requests=2, mean_prompt=50, mean_output=4)
    first, second = (load.prompt_ids(r, vocab_size=5000) for r in load.requests)
    assert first[:8] != second[:8]
    assert first == load.prompt_ids(load.requests[0], vocab_size=5000)
    assert min(first) >= 256


def test_invalid_loads_and_traces_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv is not a trace: KeyError\('TIMESTAMP'\)"):
        read_trace(tmp_path / "other.csv")
    (tmp_path / "empty.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(ValueError, match="has 0 requests"):
        read_trace(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match="num_clients is 0"):
        closed_loop(0, num_requests=1, mean_prompt=8, mean_output=8)
    with pytest.raises(ValueError, match="rate is -1"):
        open_loop(-1, num_requests=1, mean_prompt=8, mean_output=8)
    with pytest.raises(ValueError, match="speed is 0"):
        read_trace(tmp_path / "empty.csv", speed=0)
