from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.bench.metrics import (
    RequestTimes,
    effective_throughput,
    ewm_mean,
    median_summary,
    meets_promise,
    summarize,
    summarize_closed_loop,
)


def times(*token_times: float, prompt: int = 512, start: float = 0.0, name: str = "a") -> RequestTimes:
    return RequestTimes(request_id=name, num_prompt_tokens=prompt, start=start, token_times=token_times)


def test_tgt_is_the_time_to_the_first_token_followed_by_gaps() -> None:
    request = times(3.0, 3.5, 4.5, start=1.0)
    assert request.tgt == (2.0, 0.5, 1.0)
    assert request.time_to_first_token == 2.0
    assert request.latency == 3.5


def test_decode_rate_counts_tokens_after_the_first_arrival() -> None:
    assert times(1.0, 2.0, 3.0, 5.0).decode_rate == pytest.approx(3 / 4)
    # Two tokens arrived first, together: both belong to the prompt's step.
    assert times(1.0, 1.0, 2.0, 3.0).decode_rate == pytest.approx(2 / 2)
    assert times(1.0, 1.0).decode_rate is None


def test_a_summary_equals_figures_computed_by_hand() -> None:
    summary = summarize([times(1.0, 2.0, 4.0, 5.0, prompt=10), times(2.0, 3.0, 6.0, 10.0, prompt=20, name="b")])
    assert summary.wall == 10.0
    assert summary.output_rate == pytest.approx(0.8)
    assert summary.total_rate == pytest.approx(3.8)
    assert (summary.ttft_p50, summary.ttft_max) == (1.5, 2.0)
    # Gaps without the first (time to first token) and the last of each request: 1, 2 and 1, 3.
    assert summary.token_latency_p50 == pytest.approx(1.5)
    assert summary.token_latency_p90 == pytest.approx(np.percentile([1, 2, 1, 3], 90))
    assert summary.token_latency_p95 == pytest.approx(np.percentile([1, 2, 1, 3], 95))
    assert summary.decode_rate_p50 == pytest.approx((3 / 4 + 3 / 8) / 2)
    assert summary.latency_mean == 7.5


def test_a_run_is_timed_from_the_first_request_sent() -> None:
    assert summarize([times(7.0, start=5.0), times(9.0, start=6.0, name="b")]).wall == 4.0


def test_requests_of_two_tokens_have_no_token_latency() -> None:
    summary = summarize([times(1.0, 2.0)])
    assert (summary.token_latency_p50, summary.token_latency_p95) == (None, None)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 30))
def test_ewm_equals_the_weighted_mean_of_its_definition(values: list[float], span: int) -> None:
    decay = 1 - 2 / (span + 1)
    for index, mean in enumerate(ewm_mean(values, span=span)):
        weights = [decay**age for age in range(index + 1)]
        direct = sum(w * v for w, v in zip(weights, reversed(values[: index + 1]), strict=True)) / sum(weights)
        assert mean == pytest.approx(direct, rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.integers(1, 30))
def test_ewm_equals_that_of_pandas(values: list[float], span: int) -> None:
    expected = pandas.Series(values).ewm(span=span, adjust=True).mean()
    np.testing.assert_allclose(ewm_mean(values, span=span), expected, rtol=1e-9, atol=1e-9)


def test_a_closed_loop_is_summarized_as_fastgen_does() -> None:
    requests = [
        times(9.0, 9.5, 9.6, 9.8, start=8.0, name="last"),
        times(2.0, 2.1, 2.5, 2.6, start=1.0, name="second"),
        times(1.0, 5.0, 6.0, 7.0, start=0.0, name="first"),
        times(4.0, 4.2, 4.8, 4.9, start=2.0, name="third"),
    ]
    summary = summarize_closed_loop(requests, num_clients=2)
    assert summary.latency == pytest.approx((1.8 + 1.6 + 7.0 + 2.9) / 4)
    assert summary.throughput == pytest.approx(2 / summary.latency)
    assert summary.first_token_mean == pytest.approx((1 + 1 + 1 + 2) / 4)
    # Of the second and the third request to start, the gaps between the first and the last: 0.1, 0.4 and 0.2, 0.6.
    assert summary.token_latency_p50 == pytest.approx(0.3)
    assert summary.token_latency_p95 == pytest.approx(np.percentile([0.1, 0.4, 0.2, 0.6], 95))


def test_one_request_has_no_token_latency_in_a_closed_loop() -> None:
    assert summarize_closed_loop([times(1.0, 2.0, 3.0, 4.0)], num_clients=1).token_latency_p50 is None


def test_a_lower_prompt_rate_allows_more_time_to_the_first_token() -> None:
    request = times(4.0, 4.1, prompt=512)
    assert not meets_promise(request, tokens_per_second=2)
    assert meets_promise(request, tokens_per_second=2, prompt_rate=128)


def test_the_sla_is_met_only_if_every_smoothed_gap_is_shorter() -> None:
    # Smoothed gaps by hand for span 16: 0.5, then (0.6 + 15/17 * 0.5) / (1 + 15/17) = 0.553125.
    request = times(0.5, 1.0, 1.6, prompt=512)
    assert ewm_mean(request.tgt[1:]) == pytest.approx([0.5, 0.553125])
    assert meets_promise(request, tokens_per_second=1 / 0.5532)
    assert not meets_promise(request, tokens_per_second=1 / 0.5531)


def test_a_request_of_one_token_only_needs_its_first_token_in_time() -> None:
    assert meets_promise(times(0.9, prompt=512), tokens_per_second=8)
    assert not meets_promise(times(1.1, prompt=512), tokens_per_second=8)


def test_a_late_first_token_violates_the_sla() -> None:
    on_time, late = times(1.0, 1.1, prompt=512), times(1.01, 1.1, prompt=512)
    assert meets_promise(on_time, tokens_per_second=2)
    assert not meets_promise(late, tokens_per_second=2)


def test_the_cumulative_variant_allows_a_long_gap_only_if_tokens_were_early() -> None:
    ahead = times(0.5, 0.6, 0.7, 0.8, 1.9, prompt=512)  # 1.1 s of silence, but 4 tokens in 1.4 s
    assert meets_promise(ahead, tokens_per_second=2, variant="cumulative")
    assert meets_promise(ahead, tokens_per_second=2)  # smoothed over 4 gaps: about 0.41 s
    behind = times(0.5, 1.6, 1.7, 1.8, 1.9, prompt=512)
    assert not meets_promise(behind, tokens_per_second=2, variant="cumulative")
    assert not meets_promise(behind, tokens_per_second=2)


def test_effective_throughput_counts_only_requests_that_met_the_sla() -> None:
    kept, broken = times(1.0, 1.2, 2.0), times(3.0, 3.1, 4.0, name="b")
    assert effective_throughput([kept, broken], tokens_per_second=1) == pytest.approx(1 / 4)


def test_the_median_is_taken_of_each_figure() -> None:
    runs = [summarize([times(at, 2 * at, 3 * at, 4 * at)]) for at in (1.0, 4.0, 2.0)]
    assert asdict(median_summary(runs)) == pytest.approx(asdict(runs[2]))


def test_times_can_be_counted_from_the_start_of_a_run() -> None:
    shifted = times(3.0, 3.5, start=1.0).since(0.5)
    assert (shifted.start, shifted.token_times) == (0.5, (2.5, 3.0))


def test_a_worker_record_becomes_one_time_per_token() -> None:
    record = {"request_id": "r", "prompt_tokens": 3, "start": 0.5, "events": [[1.0, 1], [2.0, 3]], "token_ids": [1] * 4}
    assert RequestTimes.from_record(record).token_times == (1.0, 2.0, 2.0, 2.0)


def test_invalid_measurements_are_rejected() -> None:
    with pytest.raises(ValueError, match="'a' has no tokens"):
        times()
    with pytest.raises(ValueError, match="has decreasing token times"):
        times(2.0, 1.0)
    with pytest.raises(ValueError, match="there are 0 requests"):
        summarize([])
    with pytest.raises(ValueError, match=r"the run took 0\.0 s"):
        summarize([times(0.0)])
    with pytest.raises(ValueError, match="tokens_per_second is 0"):
        meets_promise(times(1.0), tokens_per_second=0)
    with pytest.raises(ValueError, match="prompt_rate is -1"):
        meets_promise(times(1.0), tokens_per_second=1, prompt_rate=-1)
    with pytest.raises(ValueError, match="there are 0 requests"):
        summarize_closed_loop([], num_clients=1)
    with pytest.raises(ValueError, match="there are 0 runs"):
        median_summary([])
    with pytest.raises(ValueError, match="span is 0 tokens"):
        ewm_mean([1.0], span=0)
