"""`fastgen demo`: the engine at work on a few prompts."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastgen_jax.cli.options import add_pipeline_arguments, make_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    add_pipeline_arguments(parser)


def run(options: dict[str, Any]) -> int:
    """Runs the command on its parsed options and returns the exit code."""
    from fastgen_jax.demo import run

    begin = time.perf_counter()
    pipe, generation = make_pipeline(options)
    return run(pipe, generation, started_in=time.perf_counter() - begin)
