"""`fastgen simulate`: predicts how an engine performs on hardware that is not available here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgen_jax.bench.loads import Load
from fastgen_jax.bench.metrics import effective_throughput, summarize, summarize_closed_loop
from fastgen_jax.bench.options import (
    add_engine_arguments,
    add_load_arguments,
    add_results_flag,
    add_sla_arguments,
    loads_of,
    sla_rates,
)
from fastgen_jax.bench.results import RunRecord, append, context
from fastgen_jax.bench.steps import add_measurement_arguments
from fastgen_jax.bench.tables import milliseconds, table
from fastgen_jax.cli.parser import Options
from fastgen_jax.devices import DEVICES
from fastgen_jax.json_types import JsonObject
from fastgen_jax.scheduling import NEED_PROMISE, POLICIES, Promise
from fastgen_jax.simulation import MODELS, MeasuredCost, ReplicaConfig, StepCost, load_cost, simulate
from fastgen_jax.simulation.costs import roofline_cost
from fastgen_jax.simulation.paper import paper_runs, paper_table, replica_table
from fastgen_jax.simulation.service import compare_policies, replicas_needed, service_table, with_policy
from fastgen_jax.simulation.timeline import timeline_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one subcommand per question."""
    commands = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    run = commands.add_parser("run", help="predict latency and throughput of a load under one policy")
    sla = commands.add_parser("sla", help="compare how well policies keep a service level on a load")
    fleet = commands.add_parser("replicas", help="find how many replicas a load needs at a service level")
    paper = commands.add_parser("paper", help="reproduce the table of the FastGen paper: Llama-2-70B on 4 A100")
    check = commands.add_parser("validate", help="measure an engine on this machine, simulate it, and print the errors")
    add_engine_arguments(check)
    add_load_arguments(check, open_loops=False)
    add_measurement_arguments(check, rounds=3)
    for command in (run, sla, fleet):
        _add_replica_arguments(command)
        add_load_arguments(command)
        add_sla_arguments(command)
    for command in (run, fleet):
        command.add_argument(
            "--policy", default="splitfuse", choices=list(POLICIES), help="how a step is filled (default: %(default)s)"
        )
    sla.add_argument(
        "--policies",
        nargs="+",
        default=["splitfuse", "sla"],
        choices=list(POLICIES),
        help="policies to compare (default: splitfuse sla)",
    )
    for command in (run, sla):
        command.add_argument("--replicas", type=int, default=1, help="replicas behind the router (default: %(default)s)")
    fleet.add_argument(
        "--share", type=float, default=0.99, help="fraction of requests that must meet the SLA (default: %(default)s)"
    )
    fleet.add_argument("--most", type=int, default=64, help="maximum number of replicas to try (default: %(default)s)")
    paper.add_argument("--requests", type=int, default=512, help="requests per run (default: %(default)s)")
    for command in (run, paper, check):
        add_results_flag(command)


def _add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("replica")
    group.add_argument("--costs", type=Path, help="file of `fastgen bench steps`, instead of the next three flags")
    group.add_argument(
        "--model", default="llama-2-70b", choices=list(MODELS), help="model architecture and size (default: %(default)s)"
    )
    group.add_argument(
        "--hardware", default="a100", choices=list(DEVICES), help="device, by its data sheet (default: %(default)s)"
    )
    group.add_argument("--devices", type=int, default=4, help="devices per replica (default: %(default)s)")
    group.add_argument("--token-budget", type=int, help="tokens per step (default: 768, or that of the measured engine)")
    group.add_argument(
        "--max-num-seqs", type=int, help="concurrent sequences (default: 256, or that of the measured engine)"
    )
    group.add_argument("--block-size", type=int, default=64, help="tokens per KV block (default: %(default)s)")
    group.add_argument(
        "--num-blocks", type=int, help="KV blocks (default: as many as fit into memory, or those of the measured engine)"
    )
    group.add_argument(
        "--max-context-len", type=int, help="tokens per sequence (default: those of the longest request of the load)"
    )
    group.add_argument("--host-seconds", type=float, help="host time per step (default: 0.002, or as measured)")
    group.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction, default=True, help="plan a step while the previous one runs"
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="chunks that depend on their own request alone, and steps that all have --token-budget tokens, as with "
        "EngineConfig(deterministic=True)",
    )
    group.add_argument(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the prefixes that a .jsonl trace identifies",
    )


def run(options: Options) -> int:
    """Answers the question and returns the exit code."""
    args = argparse.Namespace(**options)
    return {"run": _run, "sla": _sla, "replicas": _replicas, "paper": _paper, "validate": _validate}[args.question](args)


def _replica(args: argparse.Namespace, longest: int) -> tuple[StepCost, ReplicaConfig, str]:
    """The cost model, the replica and its name. The prefix cache is only simulated if prefixes are known, from a trace."""
    caching = args.prefix_caching and args.trace is not None and args.trace.suffix == ".jsonl"
    context_len = args.max_context_len or longest
    common = {"max_context_len": context_len, "overlap": args.overlap, "prefix_caching": caching}
    common["deterministic"] = args.deterministic
    if args.costs:
        cost: MeasuredCost = load_cost(args.costs)
        engine = cost.facts["engine"]
        config = ReplicaConfig(
            num_blocks=args.num_blocks or engine["num_blocks"],
            block_size=engine["block_size"],
            windows=tuple(engine["windows"]),
            token_budget=args.token_budget or max(cost.sizes),
            max_num_seqs=args.max_num_seqs or engine["max_num_seqs"],
            host_seconds=cost.host_seconds if args.host_seconds is None else args.host_seconds,
            step_sizes=cost.sizes,
            **common,
        )
        return cost, config, str(cost.facts["model"])
    device = roofline_cost(args.model, args.hardware, args.devices)
    config = ReplicaConfig(
        num_blocks=args.num_blocks or device.num_kv_tokens() // args.block_size,
        block_size=args.block_size,
        token_budget=args.token_budget or 768,
        max_num_seqs=args.max_num_seqs or 256,
        host_seconds=0.002 if args.host_seconds is None else args.host_seconds,
        **common,
    )
    return device, config, f"{args.model} on {args.devices} {args.hardware}"


def _prepare(args: argparse.Namespace) -> tuple[Sequence[Load], StepCost, ReplicaConfig, str]:
    loads = loads_of(args, max_context_len=args.max_context_len)
    cost, config, name = _replica(args, max(load.longest_context for load in loads))
    return loads, cost, config, name


def _run(args: argparse.Namespace) -> int:
    loads, cost, config, name = _prepare(args)
    prompt_rate, generation = sla_rates(args)
    # The policy sla promises a single rate, the first of those given.
    config = with_policy(config, args.policy, Promise(prompt_rate=prompt_rate, generation_rate=generation[0]))
    rows, records, simulated, spent = [], [], 0.0, 0.0
    for load in loads:
        start = time.process_time()
        result = simulate(load, config, cost, num_replicas=args.replicas)
        spent += time.process_time() - start
        simulated += result.seconds
        summary = summarize(result.requests)
        throughput = len(result.requests) / summary.wall
        if load.num_clients is not None:
            throughput = summarize_closed_loop(result.requests, num_clients=load.num_clients).throughput
        effective = [
            effective_throughput(result.requests, tokens_per_second=rate, prompt_rate=prompt_rate) for rate in generation
        ]
        rows.append(
            (
                load.num_clients or f"{load.facts.get('rate', '')}{load.facts.get('speed', '')}",
                f"{throughput:.2f}/s",
                f"{summary.latency_mean:.2f}",
                f"{summary.ttft_p50:.2f}",
                milliseconds(summary.token_latency_p50),
                milliseconds(summary.token_latency_p95),
                " ".join(f"{x:.2f}" for x in effective),
                len(result.refused),
                f"{max(result.busy_seconds) / result.seconds:.0%}",
                result.num_preemptions,
            )
        )
        replicas = f" x {args.replicas}" if args.replicas > 1 else ""
        records.append(
            RunRecord(
                label=f"{args.policy}, {name}{replicas}",
                source="simulated",
                load=load.facts,
                requests=result.requests,
                num_refused=len(result.refused),
                settings=_settings(config, args.replicas),
                context=context(),
            )
        )
    rate_names = " ".join(f"{rate:g}" for rate in generation)
    print(
        "\n".join(
            table(
                (
                    "clients or rate",
                    "throughput",
                    "latency s",
                    "first token P50 s",
                    "gap P50 ms",
                    "P95 ms",
                    f"effective at {rate_names} tokens/s",
                    "refused",
                    "device busy",
                    "preempted",
                ),
                rows,
            )
        )
    )
    speed = simulated / max(spent, 1e-9)
    print(f"\nsimulated {simulated:.0f} s in {spent:.1f} s of CPU time: {speed:.0f} times real time")
    if args.results:
        append(args.results, records)
    return 0


def _settings(config: ReplicaConfig, num_replicas: int) -> JsonObject:
    return {
        **{k: v for k, v in vars(config).items() if k != "promise"},
        "promise": repr(config.promise),
        "num_replicas": num_replicas,
    }


def _sla(args: argparse.Namespace) -> int:
    loads, cost, config, name = _prepare(args)
    prompt_rate, generation = sla_rates(args)
    for rate in generation:
        promise = Promise(prompt_rate=prompt_rate, generation_rate=rate)
        services = compare_policies(loads, config, cost, promise, policies=args.policies, num_replicas=args.replicas)
        print(f"\n{name}: first token within prompt / {prompt_rate:g} tokens/s, then {rate:g} tokens/s\n")
        print("\n".join(service_table(services)))
    return 0


def _replicas(args: argparse.Namespace) -> int:
    loads, cost, config, name = _prepare(args)
    prompt_rate, generation = sla_rates(args)
    rows = []
    for load in loads:
        for rate in generation:
            promise = Promise(prompt_rate=prompt_rate, generation_rate=rate)
            fitted = replace(config, policy=args.policy, promise=promise if args.policy in NEED_PROMISE else None)
            number, tried = replicas_needed(load, fitted, cost, promise, share=args.share, most=args.most)
            shares = ", ".join(f"{n}: {service.share_kept:.1%}" for n, service in tried)
            rows.append((load.name, f"{tried[0][1].offered:.2f}/s", f"{rate:g}", number, shares))
    print(f"{name}, {args.policy}: replicas that meet the SLA for {args.share:.1%} of the requests\n")
    print("\n".join(table(("load", "offered", "tokens/s", "replicas", "SLA met by number of replicas"), rows)))
    return 0


def _paper(args: argparse.Namespace) -> int:
    records = paper_runs(num_requests=args.requests)
    print("Llama-2-70B on four A100 80 GB, simulated")
    print("\n".join(paper_table(records)))
    print("\n### Where the device time goes, 2600/60, 16 clients\n")
    print("\n".join(timeline_table()))
    print("\n### Replicas, 2600/60, 16 clients each; in the paper, 16 replicas reach 16.2 times the throughput of one\n")
    print("\n".join(replica_table()))
    if args.results:
        append(args.results, records)
    return 0


def _validate(args: argparse.Namespace) -> int:
    from fastgen_jax.simulation.validate import validate

    return validate(args, loads_of(args), args.results)
