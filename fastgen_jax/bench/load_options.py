"""The flags that describe a load and a service level, for every command that has one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastgen_jax.bench.loads import CLIENT_LADDER, MAX_PROMPT, Load, closed_loop, open_loop, read_trace
from fastgen_jax.bench.metrics import PROMPT_TOKENS_PER_SECOND


def add_load_arguments(parser: argparse.ArgumentParser, *, open_loops: bool = True) -> None:
    """A closed loop with a ladder of clients, and where they make sense open loops and traces."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=list(CLIENT_LADDER),
        metavar="N",
        help="closed loops with so many clients, one after another (default: FastGen's 1 to 32)",
    )
    group.add_argument("--requests", type=int, default=512, help="requests of each run (default: %(default)s)")
    group.add_argument("--prompt", type=int, default=2600, help="mean prompt tokens (default: %(default)s)")
    group.add_argument("--output", type=int, default=60, help="mean output tokens (default: %(default)s)")
    group.add_argument("--spread", type=float, default=0.3, help="standard deviation over mean (default: %(default)s)")
    group.add_argument("--max-prompt", type=int, default=MAX_PROMPT, help="longer prompts are cut (default: %(default)s)")
    group.add_argument("--length-scale", type=float, default=1.0, help="factor on all lengths (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42, help="of lengths and arrivals (default: %(default)s)")
    if open_loops:
        group.add_argument(
            "--rate", type=float, nargs="+", metavar="R", help="instead: an open loop with so many requests a second"
        )
        group.add_argument(
            "--gap-cv",
            type=float,
            default=1.0,
            help="with --rate: variation of the gaps, Gamma-distributed; 1 is Poisson (default: %(default)s)",
        )
        group.add_argument("--trace", type=Path, help="instead: replay an Azure .csv or a Mooncake .jsonl")
        group.add_argument("--speed", type=float, nargs="+", default=[1.0], help="with --trace: factor on its rate")
        group.add_argument("--first", type=int, help="with --trace: only so many requests")


def add_promise_arguments(parser: argparse.ArgumentParser) -> None:
    """FastGen's service level, and a factor for slower machines."""
    group = parser.add_argument_group("service level")
    group.add_argument(
        "--prompt-rate",
        type=float,
        default=PROMPT_TOKENS_PER_SECOND,
        help="the first token is due after the prompt's tokens over this (default: %(default)s)",
    )
    group.add_argument(
        "--generation-rates",
        type=float,
        nargs="+",
        default=[2.0, 4.0, 6.0],
        metavar="R",
        help="tokens a second that readers want (default: 2 4 6)",
    )
    group.add_argument("--sla-scale", type=float, default=1.0, help="factor on these rates (default: %(default)s)")


def rates(args: argparse.Namespace) -> tuple[float, list[float]]:
    """The promised prompt rate and generation rates, scaled; ValueError for a scale that is not above 0."""
    if args.sla_scale <= 0:
        raise ValueError(f"sla_scale is {args.sla_scale}; it must be above 0")
    return args.prompt_rate * args.sla_scale, [rate * args.sla_scale for rate in args.generation_rates]


def loads_of(args: argparse.Namespace, *, warmup: int = 1, max_context_len: int | None = None) -> Sequence[Load]:
    """The loads that the flags describe, in the order in which they are to be run; ValueError for two kinds at once."""
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
        raise ValueError("--trace and --rate are both given; a load has either recorded or drawn arrivals")
    if trace:
        return [
            read_trace(trace, speed=speed, length_scale=args.length_scale, first=args.first, max_context_len=max_context_len)
            for speed in args.speed
        ]
    if arrival_rates:
        return [open_loop(rate, gap_cv=args.gap_cv, **lengths) for rate in arrival_rates]
    return [closed_loop(n, warmup=warmup, **lengths) for n in args.clients]
