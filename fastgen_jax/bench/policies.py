"""`fastgen bench policies`: SplitFuse against prompts-first and Orca on one engine, same kernels, same load, in turns.

FastGen's closed loops, in this process: no network and no server between the policies and the clock. SplitFuse runs at
the engine's own token budget; the others need steps that hold whole prompts, and get them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen_jax.bench import machine
from fastgen_jax.bench.curves import Curve, curves
from fastgen_jax.bench.engine_options import add_engine_arguments, make_engine
from fastgen_jax.bench.load_options import add_load_arguments, add_promise_arguments, loads_of, rates
from fastgen_jax.bench.loads import Load
from fastgen_jax.bench.offline import DISTURBED_CORES
from fastgen_jax.bench.results import RunRecord, append, context, table

if TYPE_CHECKING:
    from fastgen_jax import Engine

STEPS_KEPT = 80  # of each run: enough for the picture of which token ran in which step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastgen bench policies`."""
    add_engine_arguments(parser)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["splitfuse", "prompts_first", "orca"],
        choices=["splitfuse", "prompts_first", "orca", "sla"],
        help="default: splitfuse prompts_first orca",
    )
    parser.add_argument(
        "--whole-budget", type=int, help="token budget of policies that run prompts whole (default: the longest prompt)"
    )
    parser.add_argument(
        "--whole-ladder",
        type=int,
        nargs="+",
        metavar="N",
        help="their smaller compiled steps (default: powers of two from the number of clients on)",
    )
    add_load_arguments(parser, open_loops=False)
    add_promise_arguments(parser)
    parser.add_argument("-o", "--results", type=Path, help="file to which every run is appended as a JSON line")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables and writes the runs."""
    loads = loads_of(args)
    prompt_rate, generation = rates(args)
    engines = {policy: policy_engine(args, policy, loads, prompt_rate, generation) for policy in args.policies}
    records: list[RunRecord] = []
    for load in loads:
        for policy, engine in engines.items():
            record = measure(engine, load, policy, args.model)
            records.append(record)
            foreign = record.context["foreign_cores"]
            print(
                f"{policy}, {load.num_clients} clients: {len(record.requests)} requests"
                + (f" -- disturbed: other programs kept {foreign:.1f} cores busy" if foreign >= DISTURBED_CORES else ""),
                flush=True,
            )
            if args.results:
                append(args.results, [record])
    print()
    print("\n".join(policy_tables(curves(records), prompt_rate, generation)))
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
            raise ValueError(f"--whole-budget is {budget}, but a prompt has {longest_prompt} tokens; raise it to that")
        # Generation alone fits the smallest; no step is padded to more than twice its tokens.
        powers = (1 << i for i in range((options["max_num_seqs"] - 1).bit_length(), budget.bit_length()))
        ladder = args.whole_ladder or powers
        options |= {"token_budget": budget, "budget_ladder": tuple(size for size in ladder if size < budget)}
    if policy == "sla":
        options |= {"promised_prompt_rate": prompt_rate, "promised_generation_rate": generation[0]}
    return make_engine(args, **options)


def measure(engine: Engine, load: Load, policy: str, model: str) -> RunRecord:
    """One run, with times from its beginning and the first steps of its steady state."""
    import os

    from fastgen_jax.bench.driver import StepLog, run_load

    busy, own = machine.busy_seconds(), machine.busy_seconds(os.getpgrp())
    with StepLog(engine) as log:
        finished, refused, begin = run_load(engine, load)
    own = machine.busy_seconds(os.getpgrp()) - own
    seconds = max(step.read for step in log.steps) - begin
    foreign = max(0.0, (machine.busy_seconds() - busy - own) / seconds)
    first = min(request.start for request in finished)
    steady = [step for step in log.steps if step.start >= first]
    kept = steady[len(steady) // 3 :][:STEPS_KEPT]
    config = engine.config
    return RunRecord(
        label=f"{policy}, {model} on {machine.describe()['cores']} cores",
        source="measured",
        load=load.facts,
        requests=tuple(
            type(r)(
                request_id=r.request_id,
                num_prompt_tokens=r.num_prompt_tokens,
                start=r.start - begin,
                token_times=tuple(at - begin for at in r.token_times),
            )
            for r in finished
        ),
        num_refused=len(refused),
        settings={
            "policy": policy,
            "token_budget": config.token_budget,
            "step_sizes": list(config.budget_ladder),
            "max_num_seqs": config.max_num_seqs,
            "num_blocks": config.num_blocks,
            "block_size": config.block_size,
            "dtype": config.dtype,
            "quantize": config.quantize,
            "overlap": config.choices.overlap,
        },
        context={**context(), "machine": machine.describe(), "foreign_cores": round(foreign, 3)},
        steps=tuple((s.start - begin, s.read - begin, s.num_tokens, s.chunks) for s in kept),
    )


def policy_tables(found: Sequence[Curve], prompt_rate: float, generation: Sequence[float]) -> list[str]:
    """Lines of Markdown: the curve of each label, then what the first one gains over each other."""
    lines: list[str] = []
    for curve in found:
        effective = [curve.effective(rate, prompt_rate=prompt_rate) for rate in generation]
        lines += ["", f"{curve.label}, {curve.workload}", ""]
        lines += table(
            (
                "clients",
                "throughput",
                "latency s",
                "first token s",
                "gap P50 ms",
                "P90 ms",
                "P95 ms",
                *(f"effective at {rate:g}" for rate in generation),
            ),
            [
                (
                    s.num_clients,
                    f"{s.throughput:.2f}/s",
                    f"{s.latency:.2f}",
                    f"{s.first_token_mean:.2f}",
                    _ms(s.token_latency_p50),
                    _ms(s.token_latency_p90),
                    _ms(s.token_latency_p95),
                    *(f"{row[i]:.2f}/s" for row in effective),
                )
                for i, s in enumerate(curve.summaries)
            ],
        )
    for rival in found[1:]:
        if rival.workload == found[0].workload:
            lines += ["", f"{found[0].label} against {rival.label}", ""]
            lines += table(("figure", "ours", "theirs", "ratio"), comparison(found[0], rival, prompt_rate, generation))
    return lines


def comparison(ours: Curve, rival: Curve, prompt_rate: float, generation: Sequence[float]) -> list[tuple[str, ...]]:
    """Rows of (figure, ours, theirs, how many times better ours is)."""
    rows = []
    for rate in generation:
        a, b = (max(curve.effective(rate, prompt_rate=prompt_rate)) for curve in (ours, rival))
        rows.append((f"effective throughput at {rate:g} tokens/s", f"{a:.2f}/s", f"{b:.2f}/s", f"{a / b:.2f}" if b else "-"))
    for s in ours.summaries:
        other = next((o for o in rival.summaries if o.num_clients == s.num_clients), None)
        if other and s.token_latency_p95 and other.token_latency_p95:
            rows.append(
                (
                    f"P95 token latency, {s.num_clients} clients",
                    f"{_ms(s.token_latency_p95)} ms",
                    f"{_ms(other.token_latency_p95)} ms",
                    f"{other.token_latency_p95 / s.token_latency_p95:.2f}",
                )
            )
    # At the latency of our best point short of saturation, and at the throughput that the rival has there.
    best = max(ours.summaries, key=lambda s: s.throughput)
    theirs = rival.throughput_at(best.latency)
    if theirs:
        rows.append(
            (
                f"throughput at a latency of {best.latency:.1f} s",
                f"{best.throughput:.2f}/s",
                f"{theirs:.2f}/s",
                f"{best.throughput / theirs:.2f}",
            )
        )
        latency = ours.latency_at(theirs)
        if latency:
            rows.append(
                (
                    f"latency at {theirs:.2f} requests/s",
                    f"{latency:.1f} s",
                    f"{best.latency:.1f} s",
                    f"{best.latency / latency:.2f}",
                )
            )
    return rows


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"
