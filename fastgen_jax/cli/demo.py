"""`fastgen demo`: the engine at work on a few prompts."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastgen_jax.cli.options import add_pipeline_arguments, limit_answers, make_pipeline
from fastgen_jax.cli.terminal import has_colors

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    add_pipeline_arguments(parser)


def run(options: dict[str, Any]) -> int:
    """Runs the command on its parsed options and returns the exit code."""
    from fastgen_jax.demo import run

    begin = time.perf_counter()
    pipe, generation = make_pipeline(options)
    started_in = time.perf_counter() - begin
    limit_answers(generation, 64)
    if not generation.keys() & set(SAMPLING):  # the same answers for everybody
        generation["do_sample"] = False
    return run(pipe, generation, started_in=started_in, colors=has_colors())
