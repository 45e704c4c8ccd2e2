"""`fastgen`: one module a command, imported when it is called.

A command module has `add_arguments(parser)` and `run(options: dict) -> exit code`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "generate": "answer prompts given as arguments or on standard input, one a line",
    "chat": "talk with a model; an empty line ends",
    "demo": "a few prompts at once, with a summary of how the engine ran them",
    "models": "the model families that can be served, and what of each",
    "convert": "any checkpoint as an inference snapshot, which loads at disk speed on any mesh",
    "inspect": "what a checkpoint holds: config, parameters, number formats, tokenizer",
    "serve": "a model behind OpenAI's HTTP interface, until it is told to end",
    "deployments": "the servers that run on this machine",
    "top": "what a deployment does right now, in the terminal",
    "batch": "a file of requests to a file of answers; resumes where it was stopped",
    "bench": "throughput and latency, ours and our peers'",
    "cache": "what is kept between runs: folders, sizes, measured step sizes; --clear removes it",
    "plan": "whether and how a model fits on devices that need not be here, from its config.json alone",
    "simulate": "what an engine would do on hardware that is not here",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `fastgen` command and returns its exit code: 0 for success, 2 for a mistake in what was asked for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fastgen", description="High-throughput text generation with JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_line in COMMANDS.items():
        # Only the command that is called is imported: some need what others can do without.
        command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        if argv[:1] == [name]:
            module = import_module(f"fastgen_jax.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except ValueError as error:
        print(f"fastgen: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
        return 141
