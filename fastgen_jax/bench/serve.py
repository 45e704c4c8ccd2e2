"""`fastgen bench serve`: FastGen's methodology against any OpenAI-compatible server.

fastgen bench serve --url http://127.0.0.1:8000/v1 --model M              # closed loops, 1 to 32 clients
fastgen bench serve --url ... --model M --rate 1 2 4 --gap-cv 1           # open loops: Poisson or Gamma gaps
fastgen bench serve --url ... --model M --trace conv.csv --speed 0.5      # a recorded trace
fastgen bench serve --null                                                # what the client itself can do
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
from typing import Any

from fastgen_jax.bench import machine
from fastgen_jax.bench.client import Outcome, Target, run_load
from fastgen_jax.bench.curves import curves
from fastgen_jax.bench.load_options import add_load_arguments, add_promise_arguments, loads_of, rates
from fastgen_jax.bench.loads import Load, closed_loop
from fastgen_jax.bench.metrics import RequestTimes, effective_throughput, summarize
from fastgen_jax.bench.policies import policy_tables
from fastgen_jax.bench.results import RunRecord, append, context, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastgen bench serve`."""
    parser.add_argument("--url", help="the server, up to and including /v1")
    parser.add_argument("--model", default="default", help="the name that requests ask for (default: %(default)s)")
    parser.add_argument("--label", help="what the results call the server (default: its model and url)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    parser.add_argument(
        "--extra",
        type=json.loads,
        default={"ignore_eos": True},
        metavar="JSON",
        help='further fields of every request (default: {"ignore_eos": true})',
    )
    parser.add_argument("--as-text", action="store_true", help="send words instead of token ids")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="token ids are drawn below it (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="client processes (default: %(default)s)")
    parser.add_argument("--null", action="store_true", help="measure the client against a server that answers at once")
    add_load_arguments(parser)
    parser.add_argument(
        "--max-context-len",
        type=int,
        help="with --trace: prompts are cut to what it leaves beside the output (default: never)",
    )
    add_promise_arguments(parser)
    parser.add_argument("-o", "--results", type=Path, help="file to which every run is appended as a JSON line")


def run(args: argparse.Namespace) -> int:
    """Runs the loads one after another; 1 if a request failed."""
    if args.null:
        return _null(args)
    if not args.url:
        raise ValueError("--url is missing; give the server's address up to and including /v1, or --null")
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
            raise ValueError(f"no request was answered by {args.url}; the first error is above")
        records.append(record_of(outcome, load, args.label or f"{args.model} at {args.url}"))
        print(
            f"{load.num_clients or load.facts.get('rate') or load.facts.get('speed')}: {len(outcome.finished)} answered, "
            f"{len(outcome.refused)} refused, {len(outcome.failed)} failed",
            flush=True,
        )
        if args.results:
            append(args.results, records[-1:])
    prompt_rate, generation = rates(args)
    print()
    closed = curves(records)
    lines = policy_tables(closed, prompt_rate, generation) if closed else open_table(records, prompt_rate, generation)
    print("\n".join(lines))
    return int(num_failed > 0)


def record_of(outcome: Outcome, load: Load, label: str) -> RunRecord:
    """The run as a record; times count from its beginning."""
    begin = outcome.begin
    finished = tuple(
        RequestTimes(
            request_id=r.request_id,
            num_prompt_tokens=r.num_prompt_tokens,
            start=r.start - begin,
            token_times=tuple(at - begin for at in r.token_times),
        )
        for r in outcome.finished
    )
    facts = {**context(), "machine": machine.describe(), "client_cpu_seconds": round(outcome.cpu_seconds, 3)}
    return RunRecord(
        label=label,
        source="measured",
        load=load.facts,
        requests=finished,
        num_refused=len(outcome.refused),
        num_failed=len(outcome.failed),
        context=facts,
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
                f"{1e3 * (s.token_latency_p50 or 0):.0f}",
                f"{1e3 * (s.token_latency_p95 or 0):.0f}",
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
def null_server(**options: Any) -> Iterator[str]:
    """A server in a process of its own that computes nothing; gives its url."""
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
    """The most that the client can do, and what it adds to a gap between tokens."""
    rows = []
    for clients in args.clients:
        processes = min(args.processes, clients)
        load = closed_loop(clients, num_requests=max(64, 4 * clients), mean_prompt=args.prompt, mean_output=args.output)
        with null_server() as url:
            most = run_load(Target(url=url, model="none"), load, num_processes=processes)
        gap = 0.02
        with null_server(first=gap, gap=gap) as url:
            paced = run_load(Target(url=url, model="none"), load, num_processes=processes)
        tokens = sum(len(r.token_times) for r in most.finished)
        wall = max(r.token_times[-1] for r in most.finished) - min(r.start for r in most.finished)
        s = summarize(paced.finished)
        assert s.token_latency_p50 is not None
        assert s.token_latency_p95 is not None
        paced_tokens = sum(len(r.token_times) for r in paced.finished)
        rows.append(
            (
                clients,
                processes,
                f"{tokens / wall:.0f}",
                f"{len(most.finished) / wall:.0f}",
                f"{1e6 * most.cpu_seconds / tokens:.0f}",
                f"{paced_tokens / s.wall:.0f}",
                f"{1e3 * (s.token_latency_p50 - gap):+.1f}",
                f"{1e3 * (s.token_latency_p95 - gap):+.1f}",
            )
        )
    print("The client against a server that answers at once, and one that sends a token every 20 ms to each client\n")
    print(
        "\n".join(
            table(
                (
                    "clients",
                    "processes",
                    "most tokens/s",
                    "most requests/s",
                    "client us a token",
                    "paced tokens/s",
                    "added to a gap, P50 ms",
                    "P95 ms",
                ),
                rows,
            )
        )
    )
    return 0
