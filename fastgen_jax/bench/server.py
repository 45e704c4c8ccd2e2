"""Overhead of the server: its throughput against the engine's without it, and its event loop lag under many streams.

    fastgen bench server                     # W1 offline and over HTTP, interleaved; then 200 concurrent streams

The client runs on the same machine, so its cost is part of the server's figure.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgen_jax.bench.http_load import stream_events
from fastgen_jax.bench.options import add_engine_arguments
from fastgen_jax.bench.workloads import STANDARD, Workload, make_workload, standard_workload, warmup_workload

if TYPE_CHECKING:
    from fastgen_jax import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_engine_arguments(parser)
    parser.add_argument(
        "--workload", default="W1", choices=list(STANDARD), help="workload of the first part (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, interleaved (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=200, help="concurrent streams of the second part")
    parser.add_argument("--replicas", type=int, default=1, help="replicas of the server")


@dataclass(frozen=True)
class Run:
    """One run of a workload."""

    seconds: float
    tokens: int
    gaps: list[float]
    first: list[float]
    queue: list[float]
    """Seconds each request waited for its first step; empty for an offline run."""

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


def run(args: argparse.Namespace) -> int:
    """Prints the figures and returns the exit code."""
    from fastgen_jax import Engine
    from fastgen_jax.api.client import serve

    options = {"background_compile": False, **dict(args.option)}
    engine = Engine.from_pretrained(args.model, progress=True, **options)
    vocab_size = engine.model.vocab_size
    workload = standard_workload(args.workload, vocab_size=vocab_size)
    resolved = {name: getattr(engine.config, name) for name in ("token_budget", "budget_ladder", "num_blocks")}
    client = serve(args.model, deployment_name="bench", replica_num=args.replicas, **{**options, **resolved})
    url = client.deployment.url
    try:
        warm = warmup_workload(workload, vocab_size=vocab_size)
        offline(engine, warm)
        asyncio.run(online(url, warm))
        runs: dict[str, list[Run]] = {"offline": [], "server": []}
        for number in range(args.rounds):
            # New token ids each time, so that no prompt of the previous round is in a prefix cache.
            fresh = standard_workload(args.workload, vocab_size=vocab_size, seed=1000 + number)
            runs["offline"].append(offline(engine, fresh))
            runs["server"].append(asyncio.run(online(url, fresh)))
        for name, results in runs.items():
            print(
                f"{name:8} {_median([r.rate for r in results]):8.1f} tokens/s "
                f"({min(r.rate for r in results):.1f}-{max(r.rate for r in results):.1f}), first token P50 "
                f"{_median([_median(r.first) for r in results]):.2f} s, gap P50 "
                f"{1e3 * _median([_median(r.gaps) for r in results]):.1f} ms{_delay(results)}"
            )
        ratio = _median([s.rate / o.rate for s, o in zip(runs["server"], runs["offline"], strict=True)])
        print(f"server / offline {ratio:.3f}, median of {args.rounds} pairs ({workload.description})")
        many = make_workload("streams", num_requests=args.streams, mean_prompt=64, mean_output=64, vocab_size=vocab_size)
        before = asyncio.run(lags(url))
        result = asyncio.run(online(url, many))
        after = asyncio.run(lags(url))
        _report_lag(args.streams, result, before, after)
    finally:
        client.terminate_server()
    return 0


def offline(engine: Engine, workload: Workload) -> Run:
    """Runs the workload on the engine in this process."""
    from fastgen_jax.bench.driver import outputs_of

    start = time.perf_counter()
    last: dict[str, float] = {}
    gaps, first = [], []
    tokens = 0
    requests = ((r.request_id, r.prompt_token_ids, r.max_new_tokens) for r in workload.requests)
    for now, outputs in outputs_of(engine, requests):
        for output in outputs:
            tokens += len(output.new_token_ids)
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            else:
                first.append(now - start)
            last[output.request_id] = now
    return Run(time.perf_counter() - start, tokens, gaps, first, [])


async def online(url: str, workload: Workload) -> Run:
    """Runs the workload as concurrent streams."""
    model = await _model(url)
    start = time.perf_counter()
    gaps: list[float] = []
    first: list[float] = []
    queue: list[float] = []

    async def one(prompt: tuple[int, ...], max_tokens: int) -> int:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "include_timing": True},
        }
        last = None
        async for event in stream_events(url, "/v1/completions", body):
            now = time.perf_counter()
            if event["usage"]:
                queue.append(event["timing"]["queue_ms"] / 1e3)
                return event["usage"]["completion_tokens"]
            if last is None:
                first.append(now - start)
            else:
                gaps.append(now - last)
            last = now
        raise ValueError("a stream ended without usage")

    tokens = await asyncio.gather(*(one(r.prompt_token_ids, r.max_new_tokens) for r in workload.requests))
    return Run(time.perf_counter() - start, sum(tokens), gaps, first, queue)


async def lags(url: str) -> dict[float, float]:
    """The cumulative histogram of event loop lags so far: upper bound in seconds -> count."""
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        text = (await http.get("/metrics")).text
    found = {}
    for line in text.splitlines():
        if line.startswith("fastgen:event_loop_lag_seconds_bucket"):
            bound = line.split('le="')[1].split('"')[0]
            found[float(bound)] = float(line.rsplit(" ", 1)[1])
    return found


def _delay(results: list[Run]) -> str:
    waits = [wait for run in results for wait in run.queue]
    if len(waits) < 2:
        return ""
    return f", wait for the first step P50 {_median(waits):.2f} s, P99 {statistics.quantiles(waits, n=100)[98]:.2f} s"


def _report_lag(streams: int, result: Run, before: dict[float, float], after: dict[float, float]) -> None:
    counts = {bound: after[bound] - before[bound] for bound in after}
    total = max(counts.values())
    worst = min(bound for bound, count in counts.items() if count == total)
    p99 = min(bound for bound, count in counts.items() if count >= 0.99 * total)
    print(
        f"{streams} streams: {result.rate:.1f} tokens/s, gap P50 {1e3 * _median(result.gaps):.1f} ms, P99 "
        f"{1e3 * statistics.quantiles(result.gaps, n=100)[98]:.1f} ms, wait for the first step P50 "
        f"{_median(result.queue):.2f} s, P99 {statistics.quantiles(result.queue, n=100)[98]:.2f} s"
    )
    print(
        f"event loop lag in {total:.0f} samples: P99 at most {1e3 * p99:g} ms, all at most {1e3 * worst:g} ms, "
        f"{1 - counts[0.02] / total:.2%} above 20 ms"
    )


async def _model(url: str) -> str:
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        return (await http.get("/v1/models")).json()["data"][0]["id"]


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")
