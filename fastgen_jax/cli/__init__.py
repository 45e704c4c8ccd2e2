"""`fastgen`: one module per command, imported when the command is called.

A command module has `add_arguments(parser)` and `run(options: dict) -> exit code`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module, metadata

import fastgen_jax
from fastgen_jax.cli.parser import Parser

GROUPS = {
    "use a model": {
        "run": "chat with a model in the browser, or answer one prompt",
        "chat": "chat with a model in the terminal; an empty line quits",
        "generate": "continue prompts given as arguments or on standard input, one per line",
        "demo": "answer a few prompts in one batch and summarize how the engine ran them",
        "batch": "answer a file of requests into a file of responses, resuming where it stopped",
    },
    "serve a model": {
        "serve": "serve a model over the OpenAI-compatible HTTP API until stopped",
        "deployments": "list or stop the servers on this machine",
        "top": "show what a deployment is doing, live in the terminal",
    },
    "prepare a model": {
        "models": "list the supported model families and what is supported of each",
        "inspect": "show what a checkpoint contains: config, parameters, number formats, tokenizer",
        "convert": "convert a checkpoint to a snapshot, which loads at disk speed onto any mesh",
        "plan": "check whether a model fits on devices that are not attached, from its config.json alone",
        "compile": "compile an engine's programs before its first start, also for TPUs that are not attached",
    },
    "measure": {
        "bench": "measure throughput and latency of this engine and others",
        "simulate": "predict how an engine performs on hardware that is not available here",
    },
    "look after the installation": {
        "doctor": "check versions, devices, compilers and caches, and say what to do about problems",
        "cache": "list cached files and their sizes, or remove them with --clear",
        "completion": "print the script that completes commands and flags in bash, zsh or fish",
    },
}
COMMANDS = {name: help_line for group in GROUPS.values() for name, help_line in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `fastgen` command and returns its exit code: 0 for success, 2 for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            parser = make_parser(argv[:1])
            if not argv:
                parser.print_help()
                return 2
            options = vars(parser.parse_args(argv))
            run = options.pop("run")
            del options["command"]
            return run(options)
        finally:
            sys.stdout.flush()  # here rather than at interpreter exit, so that a broken pipe is caught below
    except BrokenPipeError:  # the reader closed the pipe early, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at interpreter exit
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


def make_parser(called: Collection[str]) -> Parser:
    """Returns the parser with the flags of the commands in `called`; other commands get their help line only."""
    parser = Parser(prog="fastgen", description="High-throughput text generation with JAX.", groups=GROUPS)
    parser.add_argument(
        "--version", action="version", version=f"fastgen_jax {fastgen_jax.__version__}", help="print the version and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_line in COMMANDS.items():
        # Only called commands are imported: some commands need packages that others do not.
        command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        if name in called:
            module = import_module(f"fastgen_jax.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def requirement_of(module: str) -> str:
    """What to pip-install for a missing module: the extra of this package that brings it, else the module's own name."""
    name = module.partition(".")[0]
    try:
        requirements = metadata.requires("fastgen_jax") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        requirements = []
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        extra = marker.partition("extra ==")[2].strip(" )'\"")
        if extra and package.startswith(name) and not package[len(name) :][:1].isalnum():
            return f"'fastgen_jax[{extra}]'"
    return name
