"""`fastgen bench`: measures throughput and latency of this engine and others."""

from __future__ import annotations

import argparse

from fastgen_jax.bench import (
    compare,
    grammars,
    host,
    kv_blocks,
    loading,
    offline,
    perplexity,
    policies,
    quick,
    report,
    serve,
    server,
    start,
    steps,
    tokenizers,
)
from fastgen_jax.cli.parser import Options

BENCHMARKS = {
    "quick": quick,
    "serve": serve,
    "policies": policies,
    "steps": steps,
    "offline": offline,
    "compare": compare,
    "report": report,
    "server": server,
    "grammars": grammars,
    "host": host,
    "kv-blocks": kv_blocks,
    "loading": loading,
    "start": start,
    "perplexity": perplexity,
    "tokenizers": tokenizers,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one subcommand per benchmark; the first line of its module's docstring is its help."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in BENCHMARKS.items():
        line = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=line, description=line))


def run(options: Options) -> int:
    """Runs the named benchmark and returns the exit code."""
    return BENCHMARKS[options.pop("benchmark")].run(argparse.Namespace(**options))
