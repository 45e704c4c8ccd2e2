"""`fastgen serve`: serves a model over the OpenAI-compatible HTTP API."""

from __future__ import annotations

import argparse
import logging
import os

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import MODEL_HELP, add_fields, given_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.settings import ServerConfig

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--log-file",
        metavar="FILE",
        help="also write the log to this file; `fastgen deployments` shows its path (default: standard error only)",
    )
    add_fields(parser.add_argument_group("server"), ServerConfig)
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.serving.logs import set_up_logging
    from fastgen_jax.serving.server import run_server
    from fastgen_jax.serving.settings import ServerConfig

    server = ServerConfig(**given_options(options, ServerConfig))
    engine = EngineConfig.from_options(given_options(options, EngineConfig))
    log_file = os.path.abspath(options["log_file"]) if options["log_file"] else None
    set_up_logging(server.log_format, file=log_file)
    try:
        code = run_server(options["model"], server, engine, log_file=log_file)
    except ValueError as error:
        if log_file is None:
            raise
        logging.getLogger(__name__).error("%s", error)  # users who set a log file look there
        code = 2
    # A thread may still be compiling a model that is no longer needed; it must not delay the exit.
    os._exit(code)
