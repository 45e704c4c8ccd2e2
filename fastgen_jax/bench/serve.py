"""FastGen's methodology against any OpenAI-compatible server.

fastgen bench serve --url http://127.0.0.1:8000/v1 --model M              # closed loops, 1 to 32 clients
fastgen bench serve --url ... --model M --rate 1 2 4 --gap-cv 1           # open loops: Poisson or Gamma gaps
fastgen bench serve --url ... --model M --trace conv.csv --speed 0.5      # a recorded trace
fastgen bench serve --null                                                # the limits of the client itself
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fastgen_jax.bench.client import Outcome, Target, run_load
from fastgen_jax.bench.curves import curves
from fastgen_jax.bench.loads import Load, closed_loop
from fastgen_jax.bench.metrics import effective_throughput, summarize, wall_seconds
from fastgen_jax.bench.options import add_load_arguments, add_results_flag, add_sla_arguments, loads_of, sla_rates
from fastgen_jax.bench.results import RunRecord, append, measured_context
from fastgen_jax.bench.tables import curve_tables, milliseconds, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    parser.add_argument("--url", help="address of the server, up to and including /v1")
    parser.add_argument("--model", default="default", help="model name sent in requests (default: %(default)s)")
    parser.add_argument("--label", help="name of the server in the results (default: its model and URL)")
    parser.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="API key of the server (default: $OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--extra",
        type=json.loads,
        default={"ignore_eos": True},
        metavar="JSON",
        help='additional fields of every request (default: {"ignore_eos": true})',
    )
    parser.add_argument("--as-text", action="store_true", help="send words instead of token ids")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, help="token ids are drawn from below this (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="client processes (default: %(default)s)")
    parser.add_argument("--null", action="store_true", help="measure the client against a server that answers immediately")
    add_load_arguments(parser)
    parser.add_argument(
        "--max-context-len",
        type=int,
        help="with --trace: truncate prompts so that prompt and output fit into this many tokens (default: never)",
    )
    add_sla_arguments(parser)
    add_results_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the loads one after another; returns 1 if a request failed."""
    if args.null:
        return _null(args)
    if not args.url:
        raise ValueError("--url is missing; pass the server's address up to and including /v1, or --null")
    target = Target(
        url=args.url.rstrip("/"),
        model=args.model,
        api_key=args.api_key,
        extra=args.extra,
        as_text=args.as_text,
        vocab_size=args.vocab_size,
    )
    records = []
    num_failed = 0
    for load in loads_of(args, max_context_len=args.max_context_len):
        outcome = run_load(target, load, num_processes=min(args.processes, load.num_clients or len(load.requests)))
        for name, why in list(outcome.failed.items())[:3]:
            print(f"{name} failed: {why}", file=sys.stderr)
        num_failed += len(outcome.failed)
        if not outcome.finished:
            raise ValueError(f"{args.url} answered no request; the first error is above")
        records.append(record_of(outcome, load, args.label or f"{args.model} at {args.url}"))
        print(
            f"{load.num_clients or load.facts.get('rate') or load.facts.get('speed')}: {len(outcome.finished)} answered, "
            f"{len(outcome.refused)} refused, {len(outcome.failed)} failed",
            flush=True,
        )
        if args.results:
            append(args.results, records[-1:])
    prompt_rate, generation = sla_rates(args)
    print()
    closed = curves(records)
    lines = curve_tables(closed, prompt_rate, generation) if closed else open_table(records, prompt_rate, generation)
    print("\n".join(lines))
    return int(num_failed > 0)


def record_of(outcome: Outcome, load: Load, label: str) -> RunRecord:
    """The run as a record, with times counted from its start."""
    return RunRecord(
        label=label,
        source="measured",
        load=load.facts,
        requests=tuple(request.since(outcome.begin) for request in outcome.finished),
        num_refused=len(outcome.refused),
        num_failed=len(outcome.failed),
        context={**measured_context(), "client_cpu_seconds": round(outcome.cpu_seconds, 3)},
    )


def open_table(records: list[RunRecord], prompt_rate: float, generation: list[float]) -> list[str]:
    """Lines of Markdown for open loops."""
    rows = []
    for record in records:
        s = summarize(record.requests)
        effective = [
            effective_throughput(record.requests, tokens_per_second=rate, prompt_rate=prompt_rate) for rate in generation
        ]
        rows.append(
            (
                record.load.get("rate") or f"x {record.load['speed']}",
                f"{len(record.requests) / s.wall:.2f}/s",
                f"{s.latency_mean:.2f}",
                f"{s.ttft_p50:.2f}",
                milliseconds(s.token_latency_p50),
                milliseconds(s.token_latency_p95),
                record.num_refused,
                *(f"{value:.2f}/s" for value in effective),
            )
        )
    return table(
        (
            "rate",
            "served",
            "latency s",
            "first token P50 s",
            "gap P50 ms",
            "P95 ms",
            "refused",
            *(f"effective at {rate:g}" for rate in generation),
        ),
        rows,
    )


@contextlib.contextmanager
def null_server(**options: float) -> Iterator[str]:
    """Starts `bench.null_server` with these options in another process and yields its URL."""
    flags = [item for name, value in options.items() for item in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("null_server.py")), *flags], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def _null(args: argparse.Namespace) -> int:
    """Measures the client's highest rate, and what it adds to a gap between tokens."""
    rows = []
    for clients in args.clients:
        processes = min(args.processes, clients)
        load = closed_loop(clients, num_requests=max(64, 4 * clients), mean_prompt=args.prompt, mean_output=args.output)
        with null_server() as url:
            fastest = run_load(Target(url=url, model="none"), load, num_processes=processes)
        gap = 0.02
        with null_server(first=gap, gap=gap) as url:
            paced = run_load(Target(url=url, model="none"), load, num_processes=processes)
        tokens = sum(len(r.token_times) for r in fastest.finished)
        wall = wall_seconds(fastest.finished)
        s = summarize(paced.finished)
        assert s.token_latency_p50 is not None
        assert s.token_latency_p95 is not None
        paced_tokens = sum(len(r.token_times) for r in paced.finished)
        rows.append(
            (
                clients,
                processes,
                f"{tokens / wall:.0f}",
                f"{len(fastest.finished) / wall:.0f}",
                f"{1e6 * fastest.cpu_seconds / tokens:.0f}",
                f"{paced_tokens / s.wall:.0f}",
                f"{1e3 * (s.token_latency_p50 - gap):+.1f}",
                f"{1e3 * (s.token_latency_p95 - gap):+.1f}",
            )
        )
    print("The client against a server that answers immediately, and one that sends each client a token every 20 ms\n")
    print(
        "\n".join(
            table(
                (
                    "clients",
                    "processes",
                    "max tokens/s",
                    "max requests/s",
                    "client us per token",
                    "paced tokens/s",
                    "added to gap, P50 ms",
                    "P95 ms",
                ),
                rows,
            )
        )
    )
    return 0
