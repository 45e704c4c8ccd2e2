"""SplitFuse against prompts-first and Orca on one engine: same kernels, same load, interleaved.

FastGen's closed loops in this process, so that no network and no server affects the timing. SplitFuse runs at the engine's
own token budget; the other policies need steps that hold whole prompts, and get them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgen_jax.bench import machine
from fastgen_jax.bench.curves import curves
from fastgen_jax.bench.loads import Load
from fastgen_jax.bench.options import (
    add_engine_arguments,
    add_load_arguments,
    add_results_flag,
    add_sla_arguments,
    loads_of,
    make_engine,
    sla_rates,
)
from fastgen_jax.bench.results import RunRecord, append, measured_context
from fastgen_jax.bench.tables import curve_tables

if TYPE_CHECKING:
    from fastgen_jax import Engine

STEPS_KEPT = 80  # recorded steps per run: enough for the figure of which token ran in which step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_engine_arguments(parser)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["splitfuse", "prompts_first", "orca"],
        choices=["splitfuse", "prompts_first", "orca", "sla"],
        help="policies to compare (default: splitfuse prompts_first orca)",
    )
    parser.add_argument(
        "--whole-budget", type=int, help="token budget of policies that do not split prompts (default: the longest prompt)"
    )
    parser.add_argument(
        "--whole-ladder",
        type=int,
        nargs="+",
        metavar="N",
        help="their smaller compiled step sizes (default: powers of two, starting at the number of clients)",
    )
    add_load_arguments(parser, open_loops=False)
    add_sla_arguments(parser)
    add_results_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables and writes the runs."""
    loads = loads_of(args)
    prompt_rate, generation = sla_rates(args)
    engines = {policy: policy_engine(args, policy, loads, prompt_rate, generation) for policy in args.policies}
    records: list[RunRecord] = []
    for load in loads:
        for policy, engine in engines.items():
            record = measure(engine, load, policy, args.model)
            records.append(record)
            print(
                f"{policy}, {load.num_clients} clients: {len(record.requests)} requests"
                + machine.disturbance(record.context["foreign_cores"]),
                flush=True,
            )
            if args.results:
                append(args.results, [record])
    print()
    print("\n".join(curve_tables(curves(records), prompt_rate, generation)))
    return 0


def policy_engine(
    args: argparse.Namespace, policy: str, loads: Sequence[Load], prompt_rate: float, generation: Sequence[float]
) -> Engine:
    """An engine for one policy, sized for the largest load."""
    longest_prompt = max(r.num_prompt_tokens for load in loads for r in (*load.requests, *load.warmup))
    options: dict[str, Any] = {
        "policy": policy,
        "max_context_len": max(load.longest_context for load in loads),
        "max_num_seqs": max(load.num_clients or 1 for load in loads),
    }
    if policy in ("prompts_first", "orca"):
        budget = args.whole_budget or longest_prompt
        if budget < longest_prompt:
            raise ValueError(f"--whole-budget is {budget}, but a prompt has {longest_prompt} tokens; use at least that")
        # The smallest holds one token per client; no step is padded to more than twice its tokens.
        powers = (1 << i for i in range((options["max_num_seqs"] - 1).bit_length(), budget.bit_length()))
        ladder = args.whole_ladder or powers
        options |= {"token_budget": budget, "budget_ladder": tuple(size for size in ladder if size < budget)}
    if policy == "sla":
        options |= {"promised_prompt_rate": prompt_rate, "promised_generation_rate": generation[0]}
    return make_engine(args, **options)


def measure(engine: Engine, load: Load, policy: str, model: str) -> RunRecord:
    """One run, with times counted from its start, and the first steps of its steady state."""
    from fastgen_jax.bench.driver import StepLog, run_load

    foreign = machine.ForeignLoad(os.getpgrp())
    with StepLog(engine) as log:
        finished, refused, begin = run_load(engine, load)
    foreign_cores = foreign.cores()
    first = min(request.start for request in finished)
    steady = [step for step in log.steps if step.start >= first]
    kept = steady[len(steady) // 3 :][:STEPS_KEPT]
    config = engine.config
    return RunRecord(
        label=f"{policy}, {model} on {machine.describe()['cores']} cores",
        source="measured",
        load=load.facts,
        requests=tuple(request.since(begin) for request in finished),
        num_refused=len(refused),
        settings={
            "policy": policy,
            "token_budget": config.token_budget,
            "step_sizes": list(config.budget_ladder),
            "max_num_seqs": config.max_num_seqs,
            "num_blocks": config.num_blocks,
            "windows": list(config.windows),
            "block_size": config.block_size,
            "dtype": config.dtype,
            "quantize": config.quantize,
            "overlap": config.choices.overlap,
        },
        context={**measured_context(), "foreign_cores": round(foreign_cores, 3)},
        steps=tuple((s.start - begin, s.read - begin, s.num_tokens, s.chunks) for s in kept),
    )
