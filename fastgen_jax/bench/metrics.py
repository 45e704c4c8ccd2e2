"""Latency and throughput figures from per-request timestamps: pure functions without a clock or an engine.

`tgt` ("token generation times") is DeepSpeed-FastGen's convention: the gaps between a request's tokens, where
`tgt[0]` is the time to the first token. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import lt
from typing import Literal

import numpy as np

from fastgen_jax.json_types import JsonFields, JsonObject

PROMPT_TOKENS_PER_SECOND = 512  # FastGen's SLA for the first token: prompt_tokens / 512 seconds
Variant = Literal["ewm", "cumulative"]
EWM_SPAN = 16  # tokens; FastGen smooths the gaps between tokens with it before comparing them with the promised rate


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """One finished request: when it was sent, and when each generated token arrived."""

    request_id: str
    num_prompt_tokens: int
    start: float
    token_times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.token_times:
            raise ValueError(f"request {self.request_id!r} has no tokens; only finished requests can be measured")
        before = (self.start, *self.token_times)
        if any(map(lt, self.token_times, before)):
            raise ValueError(f"request {self.request_id!r} has decreasing token times: {before}")

    @classmethod
    def from_record(cls, record: JsonFields) -> RequestTimes:
        """From a worker's record; its `events` are pairs of a time and the number of tokens that arrived then."""
        times = tuple(float(at) for at, count in record["events"] for _ in range(count))
        return cls(
            request_id=record["request_id"],
            num_prompt_tokens=record["prompt_tokens"],
            start=float(record["start"]),
            token_times=times,
        )

    def since(self, begin: float) -> RequestTimes:
        """The same request with times counted from `begin`."""
        times = tuple(at - begin for at in self.token_times)
        return replace(self, start=self.start - begin, token_times=times)

    @property
    def tgt(self) -> tuple[float, ...]:
        """Gaps between tokens; the first entry is the time to the first token."""
        before = (self.start, *self.token_times[:-1])
        return tuple(at - earlier for earlier, at in zip(before, self.token_times, strict=True))

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending the request to its first token."""
        return self.token_times[0] - self.start

    @property
    def latency(self) -> float:
        """Seconds from sending the request to its last token."""
        return self.token_times[-1] - self.start

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first token arrived; None if all tokens arrived together."""
        seconds = self.token_times[-1] - self.token_times[0]
        after_first = sum(at > self.token_times[0] for at in self.token_times)
        return after_first / seconds if seconds > 0 else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of one run of a workload. Rates are tokens per second over the whole run; times are seconds."""

    wall: float
    """From sending the first request to the last token."""
    output_rate: float
    """Generated tokens per second."""
    total_rate: float
    """Prompt and generated tokens per second."""
    ttft_p50: float
    ttft_max: float
    token_latency_p50: float | None
    """Gaps between tokens without the first and last of each request; None if no request has three tokens."""
    token_latency_p90: float | None
    token_latency_p95: float | None
    decode_rate_p50: float | None
    """Median over requests of the tokens per second after the first token."""
    latency_mean: float


def summarize(requests: Sequence[RequestTimes]) -> Summary:
    """Returns the figures of one run; raises ValueError for an empty one."""
    if not requests:
        raise ValueError("there are 0 requests to summarize; run a workload of at least 1")
    wall = wall_seconds(requests)
    if wall <= 0:
        raise ValueError(f"the run took {wall} s; a rate needs a duration above 0")
    num_output = sum(len(request.token_times) for request in requests)
    num_total = num_output + sum(request.num_prompt_tokens for request in requests)
    first = [request.time_to_first_token for request in requests]
    p50, p90, p95 = _token_latencies(requests)
    decode = [rate for rate in (request.decode_rate for request in requests) if rate is not None]
    return Summary(
        wall=wall,
        output_rate=num_output / wall,
        total_rate=num_total / wall,
        ttft_p50=float(np.median(first)),
        ttft_max=max(first),
        token_latency_p50=p50,
        token_latency_p90=p90,
        token_latency_p95=p95,
        decode_rate_p50=float(np.median(decode)) if decode else None,
        latency_mean=float(np.mean([request.latency for request in requests])),
    )


def wall_seconds(requests: Sequence[RequestTimes]) -> float:
    """Seconds from sending the first request to the last token."""
    return max(request.token_times[-1] for request in requests) - min(request.start for request in requests)


def _token_latencies(requests: Sequence[RequestTimes]) -> tuple[float, float, float] | tuple[None, None, None]:
    """P50, P90 and P95 of the gaps between tokens, without the first and last gap of each request; None without gaps."""
    gaps = [gap for request in requests for gap in request.tgt[1:-1]]
    if not gaps:
        return None, None, None
    p50, p90, p95 = np.percentile(gaps, (50, 90, 95)).tolist()
    return p50, p90, p95


def ewm_mean(values: Sequence[float], *, span: int = EWM_SPAN) -> list[float]:
    """Exponentially weighted means, as pandas' `ewm(span, adjust=True).mean()`: weights (1 - 2/(span+1))^age."""
    if span < 1:
        raise ValueError(f"span is {span} tokens; it must be at least 1")
    decay = 1 - 2 / (span + 1)
    weighted_sum, weights, means = 0.0, 0.0, []
    for value in values:
        weighted_sum = value + decay * weighted_sum
        weights = 1 + decay * weights
        means.append(weighted_sum / weights)
    return means


def meets_promise(
    request: RequestTimes,
    *,
    tokens_per_second: float,
    prompt_rate: float = PROMPT_TOKENS_PER_SECOND,
    variant: Variant = "ewm",
) -> bool:
    """Whether the request met an SLA of `tokens_per_second`: FastGen's condition for effective throughput.

    The first token must arrive within `prompt_tokens / prompt_rate` seconds. After that either every smoothed gap must be
    below `1 / tokens_per_second` ("ewm"), or no token may be later than a reader of that speed needs it ("cumulative").
    """
    for name, rate in (("tokens_per_second", tokens_per_second), ("prompt_rate", prompt_rate)):
        if rate <= 0:
            raise ValueError(f"{name} is {rate}; it must be above 0")
    if request.time_to_first_token > request.num_prompt_tokens / prompt_rate:
        return False
    gaps = request.tgt[1:]
    if variant == "ewm":
        return all(mean < 1 / tokens_per_second for mean in ewm_mean(gaps))
    late = np.cumsum(gaps) > np.arange(1, len(gaps) + 1) / tokens_per_second
    return not bool(late.any())


def effective_throughput(
    requests: Sequence[RequestTimes],
    *,
    tokens_per_second: float,
    prompt_rate: float = PROMPT_TOKENS_PER_SECOND,
    variant: Variant = "ewm",
) -> float:
    """Requests per second that met the SLA, over the whole run: FastGen's goodput."""
    if not requests:
        raise ValueError("there are 0 requests; effective throughput needs at least 1")
    met = sum(
        meets_promise(request, tokens_per_second=tokens_per_second, prompt_rate=prompt_rate, variant=variant)
        for request in requests
    )
    return met / wall_seconds(requests)


@dataclass(frozen=True, kw_only=True)
class ClosedLoopSummary:
    """FastGen's figures of one run in which each client sends its next request once the previous one is answered."""

    num_clients: int
    latency: float
    """Mean seconds from sending a request to its last token."""
    throughput: float
    """Requests per second, defined as clients / latency."""
    first_token_mean: float
    """Seconds."""
    token_latency_p50: float | None
    """Seconds between tokens, without each request's first and last gap, and without the first and last request to start."""
    token_latency_p90: float | None
    token_latency_p95: float | None


def summarize_closed_loop(requests: Sequence[RequestTimes], *, num_clients: int) -> ClosedLoopSummary:
    """Returns what FastGen's benchmark reports for a run with `num_clients` clients.

    Raises ValueError if there are no requests. Source: DeepSpeedExamples, benchmarks/inference/mii.
    """
    if not requests:
        raise ValueError("there are 0 requests to summarize; run a workload of at least 1")
    latency = float(np.mean([request.latency for request in requests]))
    if latency <= 0:
        raise ValueError(f"the mean latency is {latency} s; a rate needs a duration above 0")
    p50, p90, p95 = _token_latencies(sorted(requests, key=lambda request: request.start)[1:-1])
    return ClosedLoopSummary(
        num_clients=num_clients,
        latency=latency,
        throughput=num_clients / latency,
        first_token_mean=float(np.mean([request.time_to_first_token for request in requests])),
        token_latency_p50=p50,
        token_latency_p90=p90,
        token_latency_p95=p95,
    )


def median_summary(summaries: Sequence[Summary]) -> Summary:
    """The median of each figure over several runs of one workload; None if any run has None."""
    if not summaries:
        raise ValueError("there are 0 runs; a median needs at least 1")
    figures: JsonObject = {}
    for name in Summary.__dataclass_fields__:
        values = [getattr(summary, name) for summary in summaries]
        figures[name] = None if any(value is None for value in values) else float(np.median(values))
    return Summary(**figures)
