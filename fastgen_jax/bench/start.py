"""Seconds from a new process to the first token, by phase, with empty and with warm caches.

    fastgen bench start [--rounds 5] [--model smollm2-135m-instruct] [--option NAME=VALUE]

Each round starts two processes with the same new cache folder: the first finds it empty and leaves when all its programs are
compiled, the second finds what the first saved. The model's files, in the system's page cache, are the only thing that
both have. C++ kernels are built in the first process unless the wheel has them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen_jax.bench.options import add_engine_arguments, add_results_flag
from fastgen_jax.bench.results import append_line, measured_context
from fastgen_jax.bench.tables import table

PROMPT = "The capital of France is"
TOTAL = "first token after"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_engine_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="starts with each state of the caches (default: %(default)s)")
    add_results_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit code."""
    from fastgen_jax.checkpoint import resolve_model

    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; it must be at least 1")
    path = resolve_model(args.model)  # so that no start downloads it
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="fastgen-start-") as folder:
            for kind, measured in starts.items():
                measured.append(_start(path, dict(args.option), Path(folder)))
                print(f"round {number + 1}, {kind}: {measured[-1][TOTAL]:.2f} s", file=sys.stderr, flush=True)
                if args.results:
                    record = {"kind": "start", "caches": kind, "model": args.model, "options": dict(args.option)}
                    append_line(args.results, {**record, "seconds": measured[-1], **measured_context()})
    print("\n".join(report(starts)))
    return 0


def report(starts: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Lines of Markdown: seconds of each phase, as the median and range over the starts with equal caches."""
    phases = list(dict.fromkeys(phase for measured in starts.values() for start in measured for phase in start))

    def cell(phase: str, measured: Sequence[Mapping[str, float]]) -> str:
        seconds = [start[phase] for start in measured if phase in start]
        if not seconds:
            return "-"
        return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"

    headings = ("seconds, median (range)", *(f"{kind}, {len(measured)} starts" for kind, measured in starts.items()))
    return table(headings, [(phase, *(cell(phase, measured) for measured in starts.values())) for phase in phases])


def _start(path: Path, options: Mapping[str, Any], folder: Path) -> dict[str, float]:
    variables = {**os.environ, "FASTGEN_CACHE_DIR": str(folder / "engine"), "XDG_CACHE_HOME": str(folder)}
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has byte code
    command = [sys.executable, "-m", __name__, str(path), json.dumps(options), str(time.monotonic())]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"starting {path} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def start_once(path: str, options: Mapping[str, Any], began: float) -> dict[str, float]:
    """Seconds of each phase of a start of this process, which began at `began` on the system's monotonic clock."""
    seconds = {"interpreter": time.monotonic() - began}

    def since(start: float) -> float:
        return time.monotonic() - start

    start = time.monotonic()
    from fastgen_jax import Engine, SamplingParams

    seconds["import"] = since(start)
    engine = Engine.from_pretrained(path, **options)
    accounted = sum(seconds.values()) + sum(engine.startup_seconds.values())
    seconds |= engine.startup_seconds
    seconds["between phases"] = since(began) - accounted
    start = time.monotonic()
    engine.add(PROMPT, SamplingParams(max_new_tokens=1, do_sample=False))
    while not any(output.new_token_ids for output in engine.step()):
        pass
    seconds["first token"] = since(start)
    seconds[TOTAL] = since(began)
    start = time.monotonic()
    engine.wait_until_compiled()
    seconds["other programs"] = since(start)
    times = os.times()
    seconds["CPU seconds"] = times.user + times.system + times.children_user + times.children_system
    return seconds


if __name__ == "__main__":
    print(json.dumps(start_once(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]))))
