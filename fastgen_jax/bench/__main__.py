"""`fastgen bench`, also without the `fastgen` command around it: `python -m fastgen_jax.bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastgen_jax.bench import (
    compare,
    host,
    kv_blocks,
    loading,
    offline,
    perplexity,
    policies,
    report,
    serve,
    server,
    steps,
    tokenizers,
)

BENCHMARKS = {
    "serve": serve,
    "policies": policies,
    "steps": steps,
    "offline": offline,
    "compare": compare,
    "report": report,
    "server": server,
    "host": host,
    "kv-blocks": kv_blocks,
    "loading": loading,
    "perplexity": perplexity,
    "tokenizers": tokenizers,
}


def add_benchmarks(parser: argparse.ArgumentParser) -> None:
    """Adds one command a benchmark to `parser`; the chosen one's name is parsed into `benchmark`."""
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        first_line = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=first_line, description=first_line))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark that `argv` names; a user's mistake is printed and gives 2."""
    parser = argparse.ArgumentParser(prog="fastgen bench", description="Measures engines.")
    add_benchmarks(parser)
    arguments = parser.parse_args(argv)
    try:
        return BENCHMARKS[arguments.benchmark].run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
