"""The flags that describe an engine to be measured in this process."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen_jax import Engine


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and any field of `EngineConfig` as NAME=VALUE."""
    parser.add_argument("--model", default="smollm2-135m-instruct", help="checkpoint to run (default: %(default)s)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option, e.g. token_budget=256 or quantize=int8; may be repeated",
    )


def engine_options(pairs: list[str]) -> dict[str, Any]:
    """The options as a dict; ValueError for what is not NAME=VALUE or no field of `EngineConfig`."""
    from fastgen_jax.core.options import parse_option
    from fastgen_jax.engine import EngineConfig

    options = dict(parse_option(pair, "--option") for pair in pairs)
    known = {f.name for f in fields(EngineConfig)}
    for name in options:
        if name not in known:
            raise ValueError(f"--option {name} is unknown; engine options: {', '.join(sorted(known))}")
    return options


def make_engine(args: argparse.Namespace, **overrides: Any) -> Engine:
    """The engine that the flags describe. Prefix caching is off unless asked for: random prompts share nothing."""
    from fastgen_jax import Engine

    options = {"prefix_caching": False, **engine_options(args.option), **overrides}
    return Engine.from_pretrained(args.model, progress=True, **options)
