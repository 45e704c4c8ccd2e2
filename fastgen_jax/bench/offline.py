"""Throughput on a fixed set of requests, of this engine alone or interleaved with other engines.

Every engine runs in its own process, is warmed up with the same lengths (but other token ids), and then runs in turn:
A B C, C B A, ... Medians over the rounds are compared, and every run is appended to a file as one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgen_jax.bench import machine
from fastgen_jax.bench.metrics import Summary, median_summary, summarize
from fastgen_jax.bench.options import add_engine_option, add_results_flag, engine_option
from fastgen_jax.bench.peers import (
    Peer,
    RunResult,
    Worker,
    fastgen_peer,
    llama_server_peer,
    run_llama_bench,
    transformers_peer,
    vllm_peer,
)
from fastgen_jax.bench.results import append_line, measured_context
from fastgen_jax.bench.tables import milliseconds, table
from fastgen_jax.bench.workloads import STANDARD, Workload, make_workload, standard_workload, warmup_workload
from fastgen_jax.flags import name_text
from fastgen_jax.json_types import JsonObject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    parser.add_argument("--model", help="checkpoint for this engine (default: run only the other engines)")
    add_engine_option(parser)
    parser.add_argument(
        "--also",
        action="append",
        type=_variant,
        default=[],
        metavar="'NAME=VALUE ...'",
        help="run this engine once more with these additional options, e.g. dtype=bfloat16; may be repeated",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="CHECKOUT",
        help="also run the version of this engine in another source tree, e.g. from `git worktree add`",
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        choices=[*STANDARD, "custom"],
        help="may be repeated; custom has the sizes given by the next four flags (default: W1)",
    )
    parser.add_argument("--requests", type=int, default=32, help="requests of workload custom")
    parser.add_argument("--prompt", type=int, default=260, help="mean prompt tokens of workload custom")
    parser.add_argument("--output", type=int, default=60, help="mean generated tokens of workload custom")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation of its lengths over their mean")
    parser.add_argument("--seed", type=int, default=42, help="seed of lengths and token ids")
    parser.add_argument("--vocab-size", type=int, default=49152, help="token ids are drawn from below this")
    parser.add_argument("--rounds", type=int, default=3, help="runs per engine and workload, interleaved")
    parser.add_argument("--threads", type=int, help="threads of the other engines (default: all usable cores)")
    add_results_flag(parser)
    parser.add_argument(
        "--exclusive-lock",
        type=Path,
        metavar="FILE",
        help="hold an exclusive lock on FILE during each run, and a shared one while engines load",
    )
    others = parser.add_argument_group("other engines")
    others.add_argument("--vllm-python", help="a Python that has vLLM")
    others.add_argument("--vllm-eager", action="store_true", help="run vLLM without compiling the model")
    others.add_argument("--vllm-budget", type=int, default=2048, help="vLLM's max_num_batched_tokens")
    others.add_argument("--vllm-preload", help="libraries for vLLM's LD_PRELOAD, as its CPU guide recommends")
    others.add_argument("--hf-python", help="a Python that has torch and transformers")
    others.add_argument(
        "--hf-mode",
        choices=["static", "continuous"],
        default="static",
        help="batching of transformers: static padded batches, or continuous",
    )
    others.add_argument("--hf-model", help="Hugging Face directory for vLLM and transformers")
    others.add_argument("--llama-server", help="path of llama.cpp's llama-server")
    others.add_argument("--llama-bench", help="path of llama.cpp's llama-bench, whose pp512 and tg128 are printed")
    others.add_argument(
        "--gguf",
        action="append",
        type=name_text,
        default=[],
        metavar="NAME=PATH",
        help="model for llama.cpp; may be repeated",
    )


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    """The argparse type of `--also`: the text itself, and its options."""
    return text, dict(engine_option(pair) for pair in shlex.split(text))


def run(arguments: argparse.Namespace) -> int:
    """Runs the measurements that `arguments` describe and prints tables; returns 0 if every engine finished."""
    if arguments.rounds < 1:
        raise ValueError(f"rounds is {arguments.rounds}; it must be at least 1, and 3 or more for a meaningful median")
    workloads = [_workload(name, arguments) for name in arguments.workload or ["W1"]]
    ggufs = dict(arguments.gguf)
    threads = arguments.threads or machine.usable_cores()
    peers = choose_peers(arguments, workloads, threads=threads)
    if not peers and not arguments.llama_bench:
        raise ValueError("there is nothing to measure; pass --model, --vllm-python, --hf-python or --llama-server")
    context = measured_context()
    print(json.dumps(context["machine"]))
    for name, path in ggufs.items() if arguments.llama_bench else ():
        with machine.machine_lock(arguments.exclusive_lock, mode="exclusive"):
            rates = run_llama_bench(arguments.llama_bench, path, threads=threads)
        print(f"llama-bench {name}: " + ", ".join(f"{test} {rate:.1f} tok/s" for test, rate in rates.items()))
        if arguments.results:
            append_line(arguments.results, {**context, "engine": "llama-bench", "gguf": name, "rates": rates})
    runs = measure(peers, workloads, arguments, context) if peers else {}
    for workload in workloads if peers else ():
        print()
        print("\n".join(comparison(workload, {peer.name: runs[peer.name, workload.name] for peer in peers})))
    return 0


def choose_peers(arguments: argparse.Namespace, workloads: Sequence[Workload], *, threads: int) -> list[Peer]:
    """The requested engines, ours first, each sized for the largest workload."""
    ggufs = dict(arguments.gguf)
    slots = max(len(workload.requests) for workload in workloads)
    longest = max(workload.longest_context for workload in workloads)
    needs_folder = arguments.vllm_python or arguments.hf_python
    if needs_folder and not arguments.hf_model:
        raise ValueError("--vllm-python and --hf-python need --hf-model, a Hugging Face directory")
    if arguments.llama_server and not ggufs:
        raise ValueError("--llama-server needs at least one --gguf NAME=PATH")
    peers = []
    for flag, value in (("--also", arguments.also), ("--baseline", arguments.baseline)):
        if value and not arguments.model:
            raise ValueError(f"{flag} needs --model, the checkpoint for this engine")
    for text, options in [("", {}), *arguments.also] if arguments.model else ():
        values = {"max_context_len": longest, "max_num_seqs": slots, **dict(arguments.option), **options}
        peers.append(fastgen_peer(arguments.model, config=values, name=f"fastgen_jax {text}".strip()))
    if arguments.baseline:
        values = {"max_context_len": longest, "max_num_seqs": slots, **dict(arguments.option)}
        peers.append(fastgen_peer(arguments.model, config=values, name="baseline", checkout=arguments.baseline))
    if arguments.vllm_python:
        peers.append(
            vllm_peer(
                arguments.vllm_python,
                arguments.hf_model,
                threads=threads,
                max_model_len=longest,
                max_num_seqs=slots,
                max_num_batched_tokens=max(arguments.vllm_budget, slots),
                enforce_eager=arguments.vllm_eager,
                preload=arguments.vllm_preload,
            )
        )
    for name, path in ggufs.items() if arguments.llama_server else ():
        peers.append(
            llama_server_peer(
                arguments.llama_server,
                path,
                threads=threads,
                slots=slots,
                context_per_slot=longest,
                name=f"llama.cpp {name}",
            )
        )
    if arguments.hf_python:
        peers.append(
            transformers_peer(
                arguments.hf_python,
                arguments.hf_model,
                threads=threads,
                mode=arguments.hf_mode,
                name=f"transformers {arguments.hf_mode}",
            )
        )
    return peers


Runs = dict[tuple[str, str], list[tuple[Summary, RunResult]]]


def measure(
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    arguments: argparse.Namespace,
    context: JsonObject,
) -> Runs:
    """Runs every engine on every workload, interleaved, and returns (engine, workload) -> its runs."""
    lock = arguments.exclusive_lock
    runs: Runs = {(peer.name, workload.name): [] for peer in peers for workload in workloads}
    with contextlib.ExitStack() as stack:
        workers = []
        for peer in peers:
            with machine.machine_lock(lock, mode="shared"):
                worker = stack.enter_context(Worker(peer))
            for workload in workloads:
                with machine.machine_lock(lock, mode="exclusive"):
                    worker.run(warmup_workload(workload, vocab_size=arguments.vocab_size))
            print(f"{peer.name}: {worker.description['version']}, warm", flush=True)
            workers.append(worker)
        for round_number in range(arguments.rounds):
            for workload in workloads:
                # Forwards and backwards in turn, so that no engine always runs first.
                for worker in workers if round_number % 2 == 0 else reversed(workers):
                    with machine.machine_lock(lock, mode="exclusive"):
                        result = worker.run(workload)
                    summary = summarize(result.times)
                    runs[worker.peer.name, workload.name].append((summary, result))
                    print(
                        f"round {round_number + 1}, {workload.name}, {worker.peer.name}: "
                        f"{summary.output_rate:.1f} output tok/s, {summary.total_rate:.0f} total tok/s"
                        + machine.disturbance(result.foreign_cores),
                        flush=True,
                    )
                    if arguments.results:
                        record = {
                            **context,
                            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                            "engine": worker.peer.name,
                            "description": worker.description,
                            "workload": workload.name,
                            "seed": arguments.seed,
                            "requests": len(workload.requests),
                            "prompt_tokens": workload.num_prompt_tokens,
                            "output_tokens": workload.num_output_tokens,
                            "round": round_number + 1,
                            **asdict(summary),
                            "foreign_cores": result.foreign_cores,
                            **result.extras,
                        }
                        append_line(arguments.results, record)
    return runs


HEADINGS = (
    "engine",
    "output tok/s",
    "range",
    "total tok/s",
    "first token s",
    "gap P50 ms",
    "P95 ms",
    "decode tok/s",
    "of ours",
    "same text",
)


def comparison(workload: Workload, runs: dict[str, list[tuple[Summary, RunResult]]]) -> list[str]:
    """Lines of a Markdown table of medians, then what our engine reports about itself.

    "of ours" is the output rate relative to the first engine in the same round (median); "same text" counts the requests
    with the same tokens as there.
    """
    first = next(iter(runs.values()))
    rows = []
    for name, results in runs.items():
        median = median_summary([summary for summary, _ in results])
        rates = [summary.output_rate for summary, _ in results]
        # Runs of one round are close in time, so a drift of the machine's speed cancels in their ratio.
        ratios = [rate / summary.output_rate for rate, (summary, _) in zip(rates, first, strict=True)]
        expected, got = first[0][1].token_ids, results[0][1].token_ids
        same = sum(got[request_id] == tokens for request_id, tokens in expected.items())
        rows.append(
            (
                name,
                f"{median.output_rate:.1f}",
                f"{min(rates):.1f}-{max(rates):.1f}",
                f"{median.total_rate:.0f}",
                f"{median.ttft_p50:.2f} (max {median.ttft_max:.2f})",
                milliseconds(median.token_latency_p50, digits=1),
                milliseconds(median.token_latency_p95, digits=1),
                "-" if median.decode_rate_p50 is None else f"{median.decode_rate_p50:.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{same}/{len(expected)}",
            )
        )
    lines = [
        f"{workload.name}: {workload.description}; {workload.num_prompt_tokens} prompt and "
        f"{workload.num_output_tokens} output tokens; medians of {len(first)} runs",
        "",
        *table(HEADINGS, rows),
    ]
    for name, results in runs.items():
        lines += engine_counters(name, *results[-1])
    return lines


def engine_counters(name: str, summary: Summary, result: RunResult) -> list[str]:
    """Lines about one run from our engine's own counters; none for engines that report none."""
    if "engine_metrics" not in result.extras:
        return []
    before, after = result.extras["engine_metrics"]["before"], result.extras["engine_metrics"]["after"]
    steps = after["steps"] - before["steps"]
    tokens = after["tokens"] - before["tokens"]
    padded = after["padded_tokens"] - before["padded_tokens"]
    compiles = after["compiles_while_serving"] - before["compiles_while_serving"]
    peaks = result.extras["matmul_peak"]
    peak = max(peaks.values())
    rate = result.extras["model_flops"] / summary.wall
    ways = ", ".join(f"{way} {value / 1e9:.0f}" for way, value in peaks.items())
    return [
        "",
        f"{name}, last run: {steps} steps, {1e3 * summary.wall / max(steps, 1):.1f} ms each, "
        f"{tokens / max(steps, 1):.0f} tokens each, budget fill {tokens / max(padded, 1):.0%}, "
        f"host {after['host_ms']:.2f} ms per step, {compiles} compilations while serving",
        f"MFU {rate / peak:.0%}: {rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s measured right after ({ways})",
    ]


def _workload(name: str, arguments: argparse.Namespace) -> Workload:
    if name != "custom":
        return standard_workload(name, vocab_size=arguments.vocab_size, seed=arguments.seed)
    return make_workload(
        name,
        num_requests=arguments.requests,
        mean_prompt=arguments.prompt,
        mean_output=arguments.output,
        spread=arguments.spread,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
    )
