"""`fastgen bench offline`: how fast a fixed set of requests is served, alone or in turns with other engines.

Every engine runs in a process of its own, is warmed with the same lengths (other token ids), and then takes its turn:
A B C A B C ... Medians over the rounds are compared, and every run is appended to a file as one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgen_jax.bench import machine
from fastgen_jax.bench.metrics import Summary, median_summary, summarize
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
from fastgen_jax.bench.workloads import STANDARD, Workload, make_workload, standard_workload, warmup_workload
from fastgen_jax.core.options import parse_option, split_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run` to `parser`."""
    parser.add_argument("--model", help="checkpoint for this engine; without it only the other engines run")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option, e.g. token_budget=256 or quantize=int8; may be repeated",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="'NAME=VALUE ...'",
        help="this engine once more, with further engine options, e.g. dtype=bfloat16; may be repeated",
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        choices=[*STANDARD, "custom"],
        help="may be repeated; default W1. custom takes its sizes from the next four options",
    )
    parser.add_argument("--requests", type=int, default=32, help="requests of workload custom")
    parser.add_argument("--prompt", type=int, default=260, help="mean prompt tokens of workload custom")
    parser.add_argument("--output", type=int, default=60, help="mean generated tokens of workload custom")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation over mean of its lengths")
    parser.add_argument("--seed", type=int, default=42, help="of lengths and token ids")
    parser.add_argument("--vocab-size", type=int, default=49152, help="token ids are drawn below it")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each engine and workload, in turns")
    parser.add_argument("--threads", type=int, default=None, help="of the other engines; default: all usable cores")
    parser.add_argument("--results", type=Path, help="file to which every run is appended as a JSON line")
    parser.add_argument(
        "--exclusive-lock",
        type=Path,
        metavar="FILE",
        help="take an exclusive lock on FILE for each run, a shared one while engines load",
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
        help="whether transformers pads a batch or batches continuously",
    )
    others.add_argument("--hf-model", help="folder in Hugging Face layout, for vLLM and transformers")
    others.add_argument("--llama-server", help="llama.cpp's llama-server")
    others.add_argument("--llama-bench", help="llama.cpp's llama-bench; prints its pp512 and tg128")
    others.add_argument("--gguf", action="append", default=[], metavar="NAME=PATH", help="for llama.cpp; may be repeated")


def run(arguments: argparse.Namespace) -> int:
    """Measures what `arguments` (see `add_arguments`) ask for and prints tables; 0 if every engine finished."""
    if arguments.rounds < 1:
        raise ValueError(f"rounds is {arguments.rounds}; choose at least 1, and 3 or more for a median")
    workloads = [_workload(name, arguments) for name in arguments.workload or ["W1"]]
    ggufs = dict(split_pair(pair, "--gguf") for pair in arguments.gguf)
    threads = arguments.threads or machine.usable_cores()
    peers = choose_peers(arguments, workloads, ggufs=ggufs, threads=threads)
    if not peers and not arguments.llama_bench:
        raise ValueError("there is nothing to measure; give --model, --vllm-python, --hf-python or --llama-server")
    context = {
        "machine": machine.describe(),
        "command": shlex.join(sys.argv),
    }
    print(json.dumps(context["machine"]))
    for name, path in ggufs.items() if arguments.llama_bench else ():
        with machine.machine_to_itself(arguments.exclusive_lock, mode="exclusive"):
            rates = run_llama_bench(arguments.llama_bench, path, threads=threads)
        print(f"llama-bench {name}: " + ", ".join(f"{test} {rate:.1f} tok/s" for test, rate in rates.items()))
        _append(arguments.results, {**context, "engine": "llama-bench", "gguf": name, "rates": rates})
    runs = measure(peers, workloads, arguments, context) if peers else {}
    for workload in workloads if peers else ():
        print()
        print("\n".join(table(workload, {peer.name: runs[peer.name, workload.name] for peer in peers})))
    return 0


def choose_peers(
    arguments: argparse.Namespace, workloads: Sequence[Workload], *, ggufs: dict[str, str], threads: int
) -> list[Peer]:
    """The engines asked for, ours first, each sized for the largest workload."""
    slots = max(len(workload.requests) for workload in workloads)
    longest = max(workload.longest_context for workload in workloads)
    needs_folder = arguments.vllm_python or arguments.hf_python
    if needs_folder and not arguments.hf_model:
        raise ValueError("--vllm-python and --hf-python need --hf-model: a folder in Hugging Face layout")
    if arguments.llama_server and not ggufs:
        raise ValueError("--llama-server needs at least one --gguf NAME=PATH")
    peers = []
    if arguments.also and not arguments.model:
        raise ValueError("--also needs --model, the checkpoint for this engine")
    for further in ["", *arguments.also] if arguments.model else ():
        pairs = [
            *(parse_option(pair, "--option") for pair in arguments.option),
            *(parse_option(pair, "--also") for pair in shlex.split(further)),
        ]
        values = {"max_context_len": longest, "max_num_seqs": slots, **dict(pairs)}
        peers.append(fastgen_peer(arguments.model, config=values, name=f"fastgen_jax {further}".strip()))
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


DISTURBED_CORES = 0.15  # above it, other programs took enough of the machine to change a figure


def disturbance(result: RunResult) -> str:
    """A warning to append to a run's line, empty if the engine had the machine to itself."""
    if result.foreign_cores < DISTURBED_CORES:
        return ""
    return f" -- disturbed: other programs kept {result.foreign_cores:.1f} cores busy"


Runs = dict[tuple[str, str], list[tuple[Summary, RunResult]]]


def measure(
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    arguments: argparse.Namespace,
    context: dict[str, Any],
) -> Runs:
    """Runs every engine on every workload, in turns: (engine, workload) -> its runs."""
    lock = arguments.exclusive_lock
    runs: Runs = {(peer.name, workload.name): [] for peer in peers for workload in workloads}
    with contextlib.ExitStack() as stack:
        workers = []
        for peer in peers:
            with machine.machine_to_itself(lock, mode="shared"):
                worker = stack.enter_context(Worker(peer))
            for workload in workloads:
                with machine.machine_to_itself(lock, mode="exclusive"):
                    worker.run(warmup_workload(workload, vocab_size=arguments.vocab_size))
            print(f"{peer.name}: {worker.description['version']}, warm", flush=True)
            workers.append(worker)
        for round_number in range(arguments.rounds):
            for workload in workloads:
                for worker in workers:
                    with machine.machine_to_itself(lock, mode="exclusive"):
                        result = worker.run(workload)
                    summary = summarize(result.times)
                    runs[worker.peer.name, workload.name].append((summary, result))
                    print(
                        f"round {round_number + 1}, {workload.name}, {worker.peer.name}: "
                        f"{summary.output_rate:.1f} output tok/s, {summary.total_rate:.0f} total tok/s"
                        + disturbance(result),
                        flush=True,
                    )
                    _append(
                        arguments.results,
                        {
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
                        },
                    )
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


def table(workload: Workload, runs: dict[str, list[tuple[Summary, RunResult]]]) -> list[str]:
    """Lines of a Markdown table of medians, then what our engine says about itself.

    "of ours" is the output rate over that of the first engine; "same text" counts requests whose tokens equal its.
    """
    first = next(iter(runs.values()))
    ours = median_summary([summary for summary, _ in first])
    lines = [
        f"{workload.name}: {workload.description}; {workload.num_prompt_tokens} prompt and "
        f"{workload.num_output_tokens} output tokens; medians of {len(first)} runs",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * len(HEADINGS) + "|",
    ]
    for name, results in runs.items():
        median = median_summary([summary for summary, _ in results])
        rates = [summary.output_rate for summary, _ in results]
        expected, got = first[0][1].token_ids, results[0][1].token_ids
        same = sum(got[request_id] == tokens for request_id, tokens in expected.items())
        cells = (
            name,
            f"{median.output_rate:.1f}",
            f"{min(rates):.1f}-{max(rates):.1f}",
            f"{median.total_rate:.0f}",
            f"{median.ttft_p50:.2f} (max {median.ttft_max:.2f})",
            _milliseconds(median.token_latency_p50),
            _milliseconds(median.token_latency_p95),
            "-" if median.decode_rate_p50 is None else f"{median.decode_rate_p50:.1f}",
            f"{median.output_rate / ours.output_rate:.2f}",
            f"{same}/{len(expected)}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    for name, results in runs.items():
        lines.extend(inside(name, *results[-1]))
    return lines


def inside(name: str, summary: Summary, result: RunResult) -> list[str]:
    """What our engine's counters say about one run; nothing for engines that report none."""
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
        f"host {after['host_ms']:.2f} ms a step, {compiles} compilations while serving",
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


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _append(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
