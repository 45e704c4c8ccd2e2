"""`fastgen`: one module a command, imported when it is called.

A command module has `add_arguments(parser)` and `run(options: dict) -> exit code`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

import fastgen_jax
from fastgen_jax.cli.parser import Parser

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
    try:
        try:
            options = vars(make_parser(argv).parse_args(argv))
            run = options.pop("run")
            del options["command"]
            return run(options)
        finally:
            sys.stdout.flush()  # here, and not when Python ends, a pipe may be broken
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
        return 141
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("fastgen_jax", "pallas_kernels"):
            raise
        message = f"{argv[0]} needs {error.name}, which is not installed; pip install {requirement_of(error.name)}"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    except ValueError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"fastgen: {message}", file=sys.stderr)
    return 2


def make_parser(argv: Sequence[str]) -> Parser:
    """The parser with the flags of the command that `argv` begins with; of the others, what is not imported, a line."""
    parser = Parser(prog="fastgen", description="High-throughput text generation with JAX.")
    parser.add_argument(
        "--version", action="version", version=f"fastgen_jax {fastgen_jax.__version__}", help="print the version and leave"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_line in COMMANDS.items():
        # Only the command that is called is imported: some need what others can do without.
        command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        if list(argv[:1]) == [name]:
            module = import_module(f"fastgen_jax.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def requirement_of(module: str) -> str:
    """What to install for a module that is missing: the extra of this package that brings it, else its own name."""
    name = module.partition(".")[0]
    try:
        requirements = metadata.requires("fastgen_jax") or []
    except metadata.PackageNotFoundError:  # a clone on the path
        requirements = []
    for requirement in requirements:
        what, _, marker = requirement.partition(";")
        extra = marker.partition("extra ==")[2].strip(" )'\"")
        if extra and what.startswith(name) and not what[len(name) :][:1].isalnum():
            return f"'fastgen_jax[{extra}]'"
    return name
