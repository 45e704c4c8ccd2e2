"""Flags shared by several benchmarks, and what they describe: an engine, loads, and a service level."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen_jax.bench.loads import CLIENT_LADDER, MAX_PROMPT, Load, closed_loop, open_loop, read_trace
from fastgen_jax.bench.metrics import PROMPT_TOKENS_PER_SECOND
from fastgen_jax.flags import add_model_flag, name_value

if TYPE_CHECKING:
    from fastgen_jax import Engine


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--option`."""
    add_model_flag(parser)
    add_engine_option(parser)


def add_engine_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--option`: any field of `EngineConfig` as NAME=VALUE. The parsed value is a list of (name, value)."""
    parser.add_argument(
        "--option",
        action="append",
        type=engine_option,
        default=[],
        metavar="NAME=VALUE",
        help="an engine option, e.g. token_budget=256 or quantize=int8; may be repeated",
    )


def engine_option(pair: str) -> tuple[str, Any]:
    """The argparse type of NAME=VALUE with the name of a field of `EngineConfig`."""
    from fastgen_jax.engine import EngineConfig
    from fastgen_jax.engine.option_names import unknown_engine_option

    name, value = name_value(pair)
    known = {f.name for f in fields(EngineConfig)}
    if name not in known:
        raise argparse.ArgumentTypeError(str(unknown_engine_option(name, known)))
    return name, value


def make_engine(args: argparse.Namespace, **overrides: Any) -> Engine:
    """The engine that the flags describe, completely compiled, and without prefix caching: random prompts share nothing.

    Both are defaults that `--option` can change.
    """
    from fastgen_jax import Engine

    options = {"prefix_caching": False, "background_compile": False, **dict(args.option), **overrides}
    return Engine.from_pretrained(args.model, progress=True, **options)


def add_results_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `-o`, `--results`."""
    parser.add_argument("-o", "--results", type=Path, help="append every run to this file as a JSON line (default: none)")


def add_load_arguments(parser: argparse.ArgumentParser, *, open_loops: bool = True) -> None:
    """Adds flags for closed loops with several numbers of clients, and with `open_loops` for open loops and traces."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=list(CLIENT_LADDER),
        metavar="N",
        help="run a closed loop for each of these numbers of clients (default: FastGen's 1 to 32)",
    )
    group.add_argument("--requests", type=int, default=512, help="requests per run (default: %(default)s)")
    group.add_argument("--prompt", type=int, default=2600, help="mean prompt tokens (default: %(default)s)")
    group.add_argument("--output", type=int, default=60, help="mean output tokens (default: %(default)s)")
    group.add_argument(
        "--spread", type=float, default=0.3, help="standard deviation of lengths over their mean (default: %(default)s)"
    )
    group.add_argument("--max-prompt", type=int, default=MAX_PROMPT, help="truncate longer prompts (default: %(default)s)")
    group.add_argument("--length-scale", type=float, default=1.0, help="factor on all lengths (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42, help="seed of lengths and arrivals (default: %(default)s)")
    if open_loops:
        group.add_argument(
            "--rate", type=float, nargs="+", metavar="R", help="run open loops instead, at R requests per second each"
        )
        group.add_argument(
            "--gap-cv",
            type=float,
            default=1.0,
            help="with --rate: coefficient of variation of the Gamma-distributed gaps between arrivals; 1 is a Poisson "
            "process (default: %(default)s)",
        )
        group.add_argument("--trace", type=Path, help="replay a trace instead: an Azure .csv or a Mooncake .jsonl")
        group.add_argument("--speed", type=float, nargs="+", default=[1.0], help="with --trace: factor on its arrival rate")
        group.add_argument("--first", type=int, help="with --trace: replay only the first requests (default: all)")


def add_sla_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds flags for FastGen's service level, and a factor for slower machines."""
    group = parser.add_argument_group("service level")
    group.add_argument(
        "--prompt-rate",
        type=float,
        default=PROMPT_TOKENS_PER_SECOND,
        help="the first token is due after (prompt tokens / this) seconds (default: %(default)s)",
    )
    group.add_argument(
        "--generation-rates",
        type=float,
        nargs="+",
        default=[2.0, 4.0, 6.0],
        metavar="R",
        help="tokens per second due after the first token (default: 2 4 6)",
    )
    group.add_argument("--sla-scale", type=float, default=1.0, help="factor on these rates (default: %(default)s)")


def sla_rates(args: argparse.Namespace) -> tuple[float, list[float]]:
    """The scaled prompt rate and generation rates; raises ValueError for a scale that is not above 0."""
    if args.sla_scale <= 0:
        raise ValueError(f"sla_scale is {args.sla_scale}; it must be above 0")
    return args.prompt_rate * args.sla_scale, [rate * args.sla_scale for rate in args.generation_rates]


def loads_of(args: argparse.Namespace, *, warmup: int = 1, max_context_len: int | None = None) -> Sequence[Load]:
    """The loads that the flags describe, in the order to run them; raises ValueError for conflicting flags."""
    lengths = {
        "num_requests": args.requests,
        "mean_prompt": args.prompt,
        "mean_output": args.output,
        "spread": args.spread,
        "max_prompt": args.max_prompt,
        "length_scale": args.length_scale,
        "seed": args.seed,
    }
    trace, arrival_rates = getattr(args, "trace", None), getattr(args, "rate", None)
    if trace and arrival_rates:
        raise ValueError("--trace and --rate are both set; arrivals are either recorded or drawn, so set only one")
    if trace:
        return [
            read_trace(trace, speed=speed, length_scale=args.length_scale, first=args.first, max_context_len=max_context_len)
            for speed in args.speed
        ]
    if arrival_rates:
        return [open_loop(rate, gap_cv=args.gap_cv, **lengths) for rate in arrival_rates]
    return [closed_loop(n, warmup=warmup, **lengths) for n in args.clients]
