"""`fastgen serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields
from typing import Any

from fastgen_jax.cli.options import MODEL_HELP, add_fields, given_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.settings import ServerConfig

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--log-file",
        metavar="FILE",
        help="gets the log, as standard error does; `fastgen deployments` says where it is (default: standard error alone)",
    )
    add_fields(parser.add_argument_group("server"), ServerConfig)
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def run(options: dict[str, Any]) -> int:
    """Runs the command on its parsed options and returns the exit code."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.logs import set_up_logging
    from fastgen_jax.serving.server import run_server
    from fastgen_jax.serving.settings import ServerConfig

    model, log_file = options.pop("model"), options.pop("log_file")
    given = given_options(options)
    names = {field.name for field in fields(ServerConfig)}
    server = ServerConfig(**{name: value for name, value in given.items() if name in names})
    engine = EngineConfig.from_options({name: value for name, value in given.items() if name not in names})
    log_file = os.path.abspath(log_file) if log_file else None
    set_up_logging(server.log_format, file=log_file)
    try:
        code = run_server(model, server, engine, log_file=log_file)
    except ValueError as error:
        if log_file is None:
            raise
        logging.getLogger(__name__).error("%s", error)  # whoever asked for a log looks there
        code = 2
    # A thread may still be compiling a model that nobody waits for any more: it must not hold up the end.
    os._exit(code)
