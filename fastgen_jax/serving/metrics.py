"""Prometheus metrics under vLLM's names, so that its dashboards work; metrics that vLLM lacks start with `fastgen:`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastgen_jax.serving.work import Snapshot, Timing, Work

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_GAP_NAME, _OLD_GAP_NAME = "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"
_LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LAG_INTERVAL = 0.05  # seconds between two measurements of the event loop

# name -> (help, key of the snapshot)
_GAUGES = {
    "vllm:num_requests_running": ("Requests with KV blocks.", "running"),
    "vllm:num_requests_waiting": ("Requests waiting to run.", "waiting"),
    "fastgen:asleep": ("1 if the engine has given its memory back until the next request, else 0.", "asleep"),
    "fastgen:kv_blocks": ("All KV blocks.", "blocks"),
    "fastgen:kv_blocks_free": ("KV blocks that are free.", "free_blocks"),
}
# name without _total -> (help, key of the snapshot's counters)
_COUNTERS = {
    "vllm:prompt_tokens": ("Prompt tokens of all requests.", "prompt_tokens"),
    "vllm:generation_tokens": ("Tokens generated.", "generated_tokens"),
    "vllm:num_preemptions": ("Sequences that lost their blocks to others.", "preemptions"),
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prompt_tokens"),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    "fastgen:steps": ("Forward passes.", "steps"),
    "fastgen:step_tokens": ("Tokens computed by forward passes.", "tokens"),
    "fastgen:step_padded_tokens": ("Token slots of forward passes, padding included.", "padded_tokens"),
    "fastgen:requests": ("Requests that reached the engine.", "requests"),
    "fastgen:requests_aborted": ("Requests aborted before they finished.", "aborted"),
    "fastgen:failed_steps": ("Steps that raised an exception.", "failed_steps"),
    "fastgen:grammar_masks": ("Masks of the tokens that a grammar allows, one for each token.", "masks"),
    "fastgen:grammar_mask_seconds": ("Seconds in which these masks were computed.", "mask_seconds"),
    "fastgen:compiles_while_serving": ("Programs compiled after startup; each is a defect.", "compiles_while_serving"),
}


class ServerMetrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._snapshots: Sequence[Snapshot] = ()
        self.worst_lag = 0.0

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=tuple(buckets), registry=self.registry).labels(model_name)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to the first token.", _FIRST_TOKEN
        )
        self._gap = histogram(_GAP_NAME, "Time between two tokens.", _GAP)
        self._latency = histogram("vllm:e2e_request_latency_seconds", "Time from arrival to the last token.", _LATENCY)
        self._queue = histogram("vllm:request_queue_time_seconds", "Time from arrival to the first step.", _LATENCY)
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "Time from the first step to the first token.", _LATENCY
        )
        self._decode = histogram("vllm:request_decode_time_seconds", "Time from the first token to the last.", _LATENCY)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._lag = histogram("fastgen:event_loop_lag_seconds", "Delay of timers in the event loop.", _LAG)
        self._success = Counter(
            "vllm:request_success", "Finished requests.", ["finished_reason", "model_name"], registry=self.registry
        )
        self._http = Counter(
            "fastgen:http_responses", "HTTP responses by path and status.", ["path", "status"], registry=self.registry
        )
        self.registry.register(_EngineCollector(self))

    def note_gap(self, gap: float | None, timing: Timing) -> None:
        """Records one output: the time since the previous one, or since the start for the first."""
        if gap is None:
            self._first_token.observe((timing.first or timing.start) - timing.start)
        else:
            self._gap.observe(gap)

    def note_end(self, work: Work) -> None:
        """Records a request that has ended, finished or not."""
        n = work.samples_per_prompt
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
        """Counts an HTTP response."""
        self._http.labels(path, str(status)).inc()

    async def watch_loop(self) -> None:
        """Measures the delay of the event loop until it is cancelled."""
        while True:
            start = time.monotonic()
            await asyncio.sleep(LAG_INTERVAL)
            lag = max(0.0, time.monotonic() - start - LAG_INTERVAL)
            self._lag.observe(lag)
            self.worst_lag = max(self.worst_lag, lag)

    def render(self, snapshots: Sequence[Snapshot]) -> bytes:
        """Returns the text for Prometheus, with one set of gauges and counters per replica."""
        self._snapshots = snapshots
        text = generate_latest(self.registry)
        # Older dashboards use another name for the gaps; a second histogram would cost time for every token.
        old = [line.replace(_GAP_NAME, _OLD_GAP_NAME) for line in text.decode().splitlines() if _GAP_NAME in line]
        return text + "".join(f"{line}\n" for line in old).encode()

    def engine_metrics(self) -> Iterable[Metric]:
        """Returns the engines' gauges and counters."""
        labels = ["model_name", "engine"]
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 means all.", labels=labels)
        old_usage = GaugeMetricFamily("vllm:gpu_cache_usage_perc", "Share of KV blocks in use (older name).", labels=labels)
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
            "fastgen:event_loop_lag_worst_seconds", "The longest delay since the start.", value=self.worst_lag
        )
        return [usage, old_usage, *gauges.values(), *(counter for _, counter in counters), worst]


class _EngineCollector(Collector):
    """Hands the engines' metrics to prometheus_client whenever it renders the registry."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.engine_metrics()
