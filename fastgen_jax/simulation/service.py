"""Service levels over a trace: how well policies keep a promise, and how many replicas a promise requires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastgen_jax.bench.loads import Load, offered_rate
from fastgen_jax.bench.metrics import effective_throughput, meets_promise
from fastgen_jax.bench.tables import table
from fastgen_jax.scheduling import NEED_PROMISE, Promise
from fastgen_jax.simulation.costs import StepCost
from fastgen_jax.simulation.replica import ReplicaConfig
from fastgen_jax.simulation.simulator import Router, Simulation, least_work, simulate


@dataclass(frozen=True, kw_only=True)
class Service:
    """How the requests of one run fared under a promise."""

    policy: str
    offered: float
    """Requests per second."""
    effective: float
    """Requests per second that were served as promised."""
    share_kept: float
    """Share of all requests that were served as promised."""
    share_refused: float
    longest_overdue: float
    """The most seconds by which a first token or a refusal was later than promised."""
    first_token_p99: float
    """Seconds, of the requests that were served."""
    refused_by_length: tuple[float, ...]
    """Share refused in each quarter of the requests by prompt length, shortest first."""


def service(load: Load, result: Simulation, promise: Promise, policy: str) -> Service:
    """The figures of one run; ValueError if nothing was served."""
    if not result.requests:
        raise ValueError("no request was served at all; this hardware cannot keep the promise")
    generation, prompt = promise.generation_rate, promise.prompt_rate
    kept = sum(meets_promise(r, tokens_per_second=generation, prompt_rate=prompt) for r in result.requests)
    overdue = [r.time_to_first_token - r.num_prompt_tokens / promise.prompt_rate for r in result.requests]
    overdue += [r.at - r.sent - r.num_prompt_tokens / promise.prompt_rate for r in result.refused]
    refused = {refusal.request_id for refusal in result.refused}
    by_length = sorted(load.requests, key=lambda r: r.num_prompt_tokens)
    quarters = [by_length[i * len(by_length) // 4 : (i + 1) * len(by_length) // 4] for i in range(4)]
    return Service(
        policy=policy,
        offered=offered_rate(load.requests),
        effective=effective_throughput(result.requests, tokens_per_second=generation, prompt_rate=prompt),
        share_kept=kept / len(load.requests),
        share_refused=len(refused) / len(load.requests),
        longest_overdue=max(0.0, *overdue),
        first_token_p99=float(np.percentile([r.time_to_first_token for r in result.requests], 99)),
        refused_by_length=tuple(
            sum(r.request_id in refused for r in quarter) / max(1, len(quarter)) for quarter in quarters
        ),
    )


def with_policy(config: ReplicaConfig, policy: str, promise: Promise) -> ReplicaConfig:
    """`config` with another policy, and with the promise if the policy needs one."""
    return replace(config, policy=policy, promise=promise if policy in NEED_PROMISE else None)


def compare_policies(
    loads: Sequence[Load],
    config: ReplicaConfig,
    cost: StepCost,
    promise: Promise,
    *,
    policies: Sequence[str] = ("splitfuse", "sla"),
    num_replicas: int = 1,
    router: Router = least_work,
) -> list[Service]:
    """Simulates every policy on every load."""
    return [
        service(
            load,
            simulate(load, with_policy(config, policy, promise), cost, num_replicas=num_replicas, router=router),
            promise,
            policy,
        )
        for load in loads
        for policy in policies
    ]


def service_table(services: Sequence[Service]) -> list[str]:
    """Lines of Markdown."""
    headings = (
        "offered",
        "policy",
        "kept",
        "effective",
        "refused",
        "refused by prompt length, quarters",
        "longest overdue",
        "first token P99",
    )
    return table(
        headings,
        [
            (
                f"{s.offered:.2f}/s",
                s.policy,
                f"{s.share_kept:.1%}",
                f"{s.effective:.2f}/s",
                f"{s.share_refused:.1%}",
                " ".join(f"{share:.0%}" for share in s.refused_by_length),
                f"{s.longest_overdue:.1f} s",
                f"{s.first_token_p99:.1f} s",
            )
            for s in services
        ],
    )


def replicas_needed(
    load: Load,
    config: ReplicaConfig,
    cost: StepCost,
    promise: Promise,
    *,
    share: float = 0.99,
    most: int = 64,
    router: Router = least_work,
) -> tuple[int, list[tuple[int, Service]]]:
    """The smallest number of replicas that keeps the promise for `share` of the requests, and all results on the way.

    Doubles the number until it is enough, then bisects, assuming that the share grows with the number of replicas.
    Raises ValueError for a share outside (0, 1] and if `most` replicas are not enough.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    tried: dict[int, Service] = {}

    def enough(n: int) -> bool:
        result = simulate(load, config, cost, num_replicas=n, router=router)
        tried[n] = service(load, result, promise, config.policy)
        return tried[n].share_kept >= share

    high = 1
    while not enough(high):
        if high >= most:
            raise ValueError(
                f"{high} replicas keep the promise for {tried[high].share_kept:.1%} of the requests, not for {share:.1%}; "
                "promise less, use faster hardware, or allow more replicas"
            )
        high = min(most, 2 * high)
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high, sorted(tried.items())
