"""`fastgen bench`: throughput and latency, ours and our peers'."""

from __future__ import annotations

import argparse
from typing import Any

from fastgen_jax.bench.__main__ import BENCHMARKS, add_benchmarks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmarks, each a command of its own."""
    add_benchmarks(parser)


def run(options: dict[str, Any]) -> int:
    """Runs the benchmark that was named and returns the exit code."""
    return BENCHMARKS[options["benchmark"]].run(argparse.Namespace(**options))
