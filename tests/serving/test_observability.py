"""Observability: metrics, spans, traces, log entries, `fastgen top`."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest

from fastgen_jax.cli.top import render
from fastgen_jax.serving import spans
from fastgen_jax.serving.logs import JsonFormatter
from tests.serving.tiny_server import MODEL, with_server

BODY = {"model": MODEL, "prompt": "Once upon", "max_tokens": 6, "ignore_eos": True}


def values(text: str) -> dict[str, float]:
    """Returns the metrics by name, summed over their labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return found


def test_metrics_have_vllms_names_and_the_right_counts():
    async def scenario(client, _):
        before = values((await client.get("/metrics")).text)
        for stream in (False, True):
            await client.post("/v1/completions", json={**BODY, "n": 2, "stream": stream})
        after = values((await client.get("/metrics")).text)
        return before, after

    before, after = with_server(scenario)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["vllm:prompt_tokens_total"] == 4 * 10
    assert gained["vllm:generation_tokens_total"] == 4 * 6
    assert gained["vllm:request_success_total"] == 4
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert gained[f"vllm:{name}_count"] == 4
    assert gained["vllm:inter_token_latency_seconds_count"] == 4 * 5
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["fastgen:kv_blocks_free"] == after["fastgen:kv_blocks"] == 64
    assert gained["fastgen:compiles_while_serving_total"] == 0
    assert gained["vllm:time_per_output_token_seconds_count"] == gained["vllm:inter_token_latency_seconds_count"]


def test_responses_are_counted_by_route_and_status_and_unknown_paths_together():
    async def scenario(client, _):
        for path in ("/v1/made/up", "/v1/more"):
            await client.get(path)
        await client.post("/v1/completions", json=BODY)
        await client.post("/v1/completions", json={**BODY, "n": -1})
        return (await client.get("/metrics")).text

    lines = with_server(scenario).splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line.startswith("fastgen:http_responses_total"))
    counts = {name: float(value) for name, value in rows}
    assert counts == {
        'fastgen:http_responses_total{path="other",status="404"}': 2,
        'fastgen:http_responses_total{path="/v1/completions",status="200"}': 1,
        'fastgen:http_responses_total{path="/v1/completions",status="400"}': 1,
    }


def test_stats_have_the_timeline_since_a_step_and_top_draws_it():
    async def scenario(client, _):
        first = (await client.get("/stats")).json()
        await client.post("/v1/completions", json={**BODY, "prompt": "x" * 40})
        steps = first["engines"][0]["steps"]
        since = steps[-1][0] + 1 if steps else 0
        return first, (await client.get("/stats", params={"since_step": since})).json(), (await client.get("/trace")).json()

    first, second, trace = with_server(scenario)
    steps = second["engines"][0]["steps"]
    assert sum(step[1] for step in steps) == 41 + 5  # the prompt and all generated tokens but the last
    assert sum(step[2] for step in steps) == 5
    assert max(step[1] for step in steps) == 32  # the budget: the prompt was split
    drawn = render(second, first, 1.0)
    assert f"step {steps[0][0]:>6} {'░' * 40}  0 generated, 32 prompt tokens" in drawn
    device = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 0]
    assert [e["args"]["step"] for e in device] == sorted(e["args"]["step"] for e in device)
    for earlier, later in pairwise(device):
        assert earlier["ts"] + earlier["dur"] <= later["ts"] + 1, "steps do not overlap on the device"


def test_a_request_is_a_span_with_its_tokens_and_times():
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="pip install opentelemetry-sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans.trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def scenario(client, _):
        await client.post("/v1/completions", json=BODY, headers={"traceparent": parent})

    with_server(scenario)
    # FastAPI may record further spans.
    (span,) = [s for s in exporter.get_finished_spans() if s.instrumentation_scope.name == "fastgen_jax"]
    assert span.name == f"text_completion {MODEL}"
    assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
    assert span.attributes["gen_ai.usage.output_tokens"] == 6
    assert span.attributes["gen_ai.usage.input_tokens"] == 10
    seconds = (span.end_time - span.start_time) / 1e9
    assert seconds == pytest.approx(span.attributes["gen_ai.latency.e2e"], abs=0.001)


def test_a_log_entry_is_one_json_object():
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "answered %d", (3,), None)
    record.request_id = "abc"
    entry = json.loads(JsonFormatter().format(record))
    assert entry["message"] == "answered 3"
    assert (entry["level"], entry["request_id"]) == ("info", "abc")
