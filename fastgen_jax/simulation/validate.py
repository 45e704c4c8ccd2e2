"""Compares simulation with measurement: the same loads on a real engine and on its simulation."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from fastgen_jax.bench import steps
from fastgen_jax.bench.curves import curves
from fastgen_jax.bench.loads import Load
from fastgen_jax.bench.machine import DISTURBED_CORES
from fastgen_jax.bench.options import make_engine
from fastgen_jax.bench.policies import measure
from fastgen_jax.bench.results import RunRecord, append
from fastgen_jax.bench.tables import table
from fastgen_jax.simulation.costs import MeasuredCost, cost_from
from fastgen_jax.simulation.replica import ReplicaConfig
from fastgen_jax.simulation.simulator import simulate

ALLOWED = 0.10  # relative error of latency and throughput
FIGURES = ("latency", "throughput", "first_token_mean", "token_latency_p50", "token_latency_p95")


def validate(args: argparse.Namespace, loads: Sequence[Load], results: Path | None) -> int:
    """Measures step costs, runs the loads on an engine, simulates them, and prints the errors; 1 if one exceeds 10%.

    The loads are closed loops. Step costs come from batches of other lengths. Costs and loads are measured in turn,
    `args.rounds` times, so that a machine that slows down affects both; the medians of the loads' figures are compared.
    """
    if args.rounds < 1:
        raise ValueError(f"rounds is {args.rounds}; choose at least 1, and 3 or more for a median")
    engine = make_engine(
        args,
        max_context_len=max(load.longest_context for load in loads),
        max_num_seqs=max(load.num_clients or 1 for load in loads),
    )
    points: list[steps.Point] = []
    measured: list[list[RunRecord]] = []
    for number in range(args.rounds):
        points += steps.measure(engine, contexts=args.contexts, generated=args.generated, rounds=1)
        measured.append([measure(engine, load, str(engine.config.choices.policy), args.model) for load in loads])
        print(f"round {number + 1} of {args.rounds}", flush=True)
    model = steps.fit(points, steps.facts_of(engine, args.model))
    print("\n".join(steps.report(points, model)))
    cost = cost_from(model)
    simulated = [simulated_twin(record, load, cost) for record, load in zip(measured[0], loads, strict=True)]
    if results:
        append(results, [*(record for records in measured for record in records), *simulated])
    lines, worst = errors(measured, simulated)
    print("\n" + "\n".join(lines))
    foreign = max(record.context["foreign_cores"] for records in measured for record in records)
    if foreign >= DISTURBED_CORES:
        print(f"\ndisturbed: other programs kept up to {foreign:.1f} cores busy")
    print(f"\nlargest error of latency and throughput: {worst:.1%} (allowed {ALLOWED:.0%})")
    return int(worst > ALLOWED)


def simulated_twin(record: RunRecord, load: Load, cost: MeasuredCost) -> RunRecord:
    """The simulation of a measured run, with the settings of its engine."""
    s = record.settings
    config = ReplicaConfig(
        num_blocks=s["num_blocks"],
        block_size=s["block_size"],
        windows=tuple(s["windows"]),
        max_context_len=load.longest_context,
        policy=s["policy"],
        token_budget=s["token_budget"],
        max_num_seqs=s["max_num_seqs"],
        overlap=s["overlap"],
        host_seconds=cost.host_seconds,
    )
    result = simulate(load, config, cost)
    return RunRecord(
        label=f"{record.label}, simulated",
        source="simulated",
        load=load.facts,
        requests=result.requests,
        settings=s,
        context={k: v for k, v in record.context.items() if k != "foreign_cores"},
    )


def errors(measured: Sequence[Sequence[RunRecord]], simulated: Sequence[RunRecord]) -> tuple[list[str], float]:
    """Lines of Markdown with both figures and their difference, and the largest error of latency and throughput.

    `measured` contains rounds of the same loads; their medians are compared.
    """
    (twin,) = curves(simulated)
    rounds = [curves(records)[0] for records in measured]
    rows, worst = [], 0.0
    for i, b in enumerate(twin.summaries):
        for name in FIGURES:
            found = [getattr(curve.summaries[i], name) for curve in rounds]
            y = getattr(b, name)
            if y is None or None in found:
                continue
            x = statistics.median(found)
            error = y / x - 1
            if name in FIGURES[:2]:
                worst = max(worst, abs(error))
            rows.append((b.num_clients, name, f"{x:.4g}", f"{min(found):.4g}-{max(found):.4g}", f"{y:.4g}", f"{error:+.1%}"))
    return table(("clients", "figure", "measured", "range", "simulated", "error"), rows), worst
