"""Metrics for Prometheus, under the names that vLLM's dashboards look for; what vLLM has not is called `fastgen:`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastgen_jax.serving.work import Timing, Work

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_GAP_NAME, _OLD_GAP_NAME = "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"
_LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LAG_INTERVAL = 0.05  # seconds between two looks at the event loop

# name -> (help, key of the snapshot)
_GAUGES = {
    "vllm:num_requests_running": ("Requests that hold KV blocks.", "running"),
    "vllm:num_requests_waiting": ("Requests that wait to run.", "waiting"),
    "fastgen:kv_blocks": ("KV blocks in all.", "blocks"),
    "fastgen:kv_blocks_free": ("KV blocks that nobody holds.", "free_blocks"),
}
# name without _total -> (help, key of the snapshot's counters)
_COUNTERS = {
    "vllm:prompt_tokens": ("Prompt tokens of all requests.", "prompt_tokens"),
    "vllm:generation_tokens": ("Tokens generated.", "generated_tokens"),
    "vllm:num_preemptions": ("Sequences that gave up their blocks.", "preemptions"),
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prompt_tokens"),
    "vllm:prefix_cache_hits": ("Prompt tokens found there.", "prefix_hit_tokens"),
    "fastgen:steps": ("Forward passes.", "steps"),
    "fastgen:step_tokens": ("Tokens computed by them.", "tokens"),
    "fastgen:step_padded_tokens": ("Tokens that they had room for.", "padded_tokens"),
    "fastgen:requests": ("Requests that reached the engine.", "requests"),
    "fastgen:requests_aborted": ("Requests ended before they were finished.", "aborted"),
    "fastgen:failed_steps": ("Steps that raised an exception.", "failed_steps"),
    "fastgen:compiles_while_serving": ("Programs compiled after the start; each is a defect.", "compiles_while_serving"),
}


class ServerMetrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._snapshots: list[dict[str, Any]] = []
        self.worst_lag = 0.0

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Any:
            return Histogram(name, text, ["model_name"], buckets=tuple(buckets), registry=self.registry).labels(model_name)

        self._first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._gap = histogram(_GAP_NAME, "Between two tokens.", _GAP)
        self._latency = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY)
        self._queue = histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", _LATENCY)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", _LATENCY)
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _LATENCY)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._lag = histogram("fastgen:event_loop_lag_seconds", "How late the event loop comes to a timer.", _LAG)
        self._success = Counter(
            "vllm:request_success", "Finished requests.", ["finished_reason", "model_name"], registry=self.registry
        )
        self._http = Counter(
            "fastgen:http_responses", "Answers by path and status.", ["path", "status"], registry=self.registry
        )
        self.registry.register(self)  # pyright: ignore[reportArgumentType] (a collector is what has `collect`)

    def note_gap(self, gap: float | None, timing: Timing) -> None:
        """Takes in one output: the time since the one before it, or that of the first."""
        if gap is None:
            self._first_token.observe((timing.first or timing.start) - timing.start)
        else:
            self._gap.observe(gap)

    def note_end(self, work: Work) -> None:
        """Takes in a request that has ended, finished or not."""
        n = work.samples_a_prompt
        for index, timing in enumerate(work.timings):
            reason = work.reasons[index] or "abort"
            self._success.labels(reason, self._model).inc()
            self._prompt.observe(len(work.prompts[index // n]))
            self._generated.observe(work.generated[index])
            if timing.first is not None and timing.last is not None:
                self._latency.observe(timing.last - timing.start)
                self._queue.observe(timing.queue)
                self._prefill.observe(max(0.0, timing.first - timing.start - timing.queue))
                self._decode.observe(timing.last - timing.first)

    def note_response(self, path: str, status: int) -> None:
        """Counts an HTTP answer."""
        self._http.labels(path, str(status)).inc()

    async def watch_loop(self) -> None:
        """Measures, for ever, how late the event loop is."""
        while True:
            start = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL)
            lag = max(0.0, time.monotonic() - start - LAG_INTERVAL)
            self._lag.observe(lag)
            self.worst_lag = max(self.worst_lag, lag)

    def render(self, snapshots: list[dict[str, Any]]) -> bytes:
        """The text that Prometheus reads; one set of gauges and counters a replica."""
        self._snapshots = snapshots
        text = generate_latest(self.registry)
        # Dashboards that are older know the gaps under another name; counting them twice would cost every token.
        old = [line.replace(_GAP_NAME, _OLD_GAP_NAME) for line in text.decode().splitlines() if _GAP_NAME in line]
        return text + "".join(f"{line}\n" for line in old).encode()

    def collect(self) -> Iterable[Metric]:
        """What the engines say, for prometheus_client."""
        labels = ["model_name", "engine"]
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 is all.", labels=labels)
        old_usage = GaugeMetricFamily("vllm:gpu_cache_usage_perc", "The same (older name).", labels=labels)
        gauges = {key: GaugeMetricFamily(name, text, labels=labels) for name, (text, key) in _GAUGES.items()}
        counters = [(key, CounterMetricFamily(name, text, labels=labels)) for name, (text, key) in _COUNTERS.items()]
        for number, snapshot in enumerate(self._snapshots):
            values = [self._model, str(number)]
            share = 1 - snapshot["free_blocks"] / snapshot["blocks"] if snapshot["blocks"] else 0.0
            usage.add_metric(values, share)
            old_usage.add_metric(values, share)
            for key, family in gauges.items():
                family.add_metric(values, snapshot[key])
            for key, counter in counters:
                counter.add_metric(values, snapshot["counters"].get(key, 0))
        worst = GaugeMetricFamily(
            "fastgen:event_loop_lag_worst_seconds", "The worst lag since the start.", value=self.worst_lag
        )
        return [usage, old_usage, *gauges.values(), *(counter for _, counter in counters), worst]
