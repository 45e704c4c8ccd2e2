"""One OpenTelemetry span per request, if OpenTelemetry is installed, named after its conventions for generative models."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fastgen_jax.serving.work import Work

try:
    from opentelemetry import trace
except ImportError:
    trace = None


def record_span(operation: str, model: str, work: Work, headers: Mapping[str, str]) -> None:
    """Records a request that has ended, as part of the trace that a `traceparent` header names."""
    if trace is None:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    now = time.time() - time.monotonic()  # converts times of `Timing` to seconds since the epoch
    start = min(timing.start for timing in work.timings)
    end = max(timing.last or timing.start for timing in work.timings)
    usage = work.usage()
    timing = work.timing()
    span = trace.get_tracer("fastgen_jax").start_span(
        f"{operation} {model}",
        context=TraceContextTextMapPropagator().extract(dict(headers)),
        kind=trace.SpanKind.SERVER,
        start_time=int(1e9 * (now + start)),
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "gen_ai.response.finish_reasons": [reason or "abort" for reason in work.reasons],
            "gen_ai.latency.time_in_queue": timing["queue_ms"] / 1e3,
            "gen_ai.latency.time_to_first_token": timing["first_token_ms"] / 1e3,
            "gen_ai.latency.e2e": timing["total_ms"] / 1e3,
        },
    )
    span.end(int(1e9 * (now + end)))
