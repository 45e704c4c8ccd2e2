"""The claims of the FastGen paper next to what the simulator predicts for the paper's hardware.

Llama-2-70B on four A100 80 GB. All policies use one roofline, the same kernels and the same host: they differ only in
which tokens share a step. SplitFuse uses FastGen's step of 768 tokens; the others need steps that hold whole prompts and
use 4096 tokens, the model's context and the limit of vLLM in 2023. FastGen in 2023 did not overlap host and device.

One more server differs in the server, not the policy: prompts-first with the longest pause between steps that vLLM's
developers reported for their engine (5 to 13 ms in which the GPU waits, vllm-project/vllm issue 6854, July 2024; nothing
was found for 2023). It shows how much of the paper's ratios such pauses can explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastgen_jax.bench.curves import Curve, curves
from fastgen_jax.bench.loads import CLIENT_LADDER, closed_loop
from fastgen_jax.bench.results import RunRecord, context
from fastgen_jax.bench.tables import table
from fastgen_jax.simulation.costs import RooflineCost, roofline_cost
from fastgen_jax.simulation.replica import ReplicaConfig
from fastgen_jax.simulation.simulator import simulate

WORKLOADS = ((2600, 60), (2600, 128), (1200, 60), (1200, 128))
TOKEN_BUDGETS = {"splitfuse": 768, "prompts_first": 4096, "orca": 4096}
RATES = (2, 4, 6)  # tokens per second
NUM_REQUESTS = 512
HOST_SECONDS = 0.005  # to plan and launch a step from Python, without CUDA graphs
SLOW_HOST = "prompts_first with 13 ms of host"
SLOW_HOST_SECONDS = 0.013
SERVERS = {
    **{policy: (policy, HOST_SECONDS) for policy in TOKEN_BUDGETS},
    SLOW_HOST: ("prompts_first", SLOW_HOST_SECONDS),
}
BLOCK_SIZE = 64
CONTEXT = 4096 + 256  # prompts are truncated to 4000 tokens, outputs are not
REPLICAS = (1, 4, 8, 16)
CLAIMED_EFFECTIVE = {(2600, 60, 4): 1.42 / 0.63}  # SplitFuse over vLLM, Llama-2-70B


def paper_cost() -> RooflineCost:
    """The cost of Llama-2-70B on four A100."""
    return roofline_cost("llama-2-70b", "a100", 4)


def paper_config(policy: str, cost: RooflineCost, host_seconds: float = HOST_SECONDS) -> ReplicaConfig:
    """A server as of 2023 with one of the policies; the host needs `host_seconds` between two steps."""
    return ReplicaConfig(
        num_blocks=cost.num_kv_tokens() // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_context_len=CONTEXT,
        policy=policy,
        token_budget=TOKEN_BUDGETS[policy],
        max_num_seqs=256,
        overlap=False,
        host_seconds=host_seconds,
    )


def paper_runs(
    *,
    clients: Sequence[int] = CLIENT_LADDER,
    num_requests: int = NUM_REQUESTS,
    workloads: Iterable[tuple[int, int]] = WORKLOADS,
) -> list[RunRecord]:
    """Every server on every workload with every number of clients."""
    cost = paper_cost()
    records = []
    for prompt, output in workloads:
        for name, (policy, host_seconds) in SERVERS.items():
            for n in clients:
                load = closed_loop(n, num_requests=num_requests, mean_prompt=prompt, mean_output=output)
                result = simulate(load, paper_config(policy, cost, host_seconds), cost, record_steps=n == 16)
                records.append(
                    RunRecord(
                        label=f"{name}, llama-2-70b on 4 a100",
                        source="simulated",
                        load=load.facts,
                        requests=result.requests,
                        context=context(),
                        settings={
                            "policy": policy,
                            "token_budget": TOKEN_BUDGETS[policy],
                            "host_seconds": host_seconds,
                            "hardware": "4 a100",
                        },
                        # A window of the steady state, enough for the figure of which token ran when.
                        steps=result.steps[0][len(result.steps[0]) // 2 :][:60],
                    )
                )
    return records


def paper_table(records: Sequence[RunRecord]) -> list[str]:
    """Lines of Markdown: the paper's claims and the simulated figures."""
    by_name = {(curve.label.split(",")[0], curve.workload): curve for curve in curves(records)}
    lines = []
    for workload in dict.fromkeys(curve.workload for curve in by_name.values()):
        ours, *others = (by_name[name, workload] for name in SERVERS)
        lines += ["", f"### {workload}, {len(ours.runs[0].requests)} requests", ""]
        lines += table(
            ("SplitFuse against", "figure", "SplitFuse", "other policy", "ratio", "paper"),
            [row for other in others for row in _rows(ours, other)],
        )
    return lines


def _rows(ours: Curve, other: Curve) -> list[tuple[str, ...]]:
    prompt, output = map(int, ours.workload.split("/"))
    name = other.label.split(",")[0]
    rows = []
    for rate in RATES:
        a, b = max(ours.effective(rate)), max(other.effective(rate))
        claim = CLAIMED_EFFECTIVE.get((prompt, output, rate)) if name == "prompts_first" else None
        rows.append(
            (
                name,
                f"effective throughput at {rate} tokens/s",
                f"{a:.2f}/s",
                f"{b:.2f}/s",
                _ratio(a, b),
                f"{claim:.1f}" if claim else "-",
            )
        )
    a, b = ours.summary(16).token_latency_p95, other.summary(16).token_latency_p95
    if a and b:
        claim = "3.7" if (prompt, output, name) == (2600, 128, "prompts_first") else "-"
        rows.append((name, "P95 token latency, 16 clients", f"{1e3 * a:.0f} ms", f"{1e3 * b:.0f} ms", _ratio(b, a), claim))
    at = {2600: 9.0, 1200: 5.0}.get(prompt, 5.0)
    a, b = ours.throughput_at(at), other.throughput_at(at)
    if a and b:
        claim = "2.0" if (prompt, output, name) == (2600, 60, "prompts_first") else "-"
        rows.append((name, f"throughput at a latency of {at:g} s", f"{a:.2f}/s", f"{b:.2f}/s", _ratio(a, b), claim))
        latency = ours.latency_at(b)
        if latency:
            rows.append(
                (name, f"latency at {b:.2f} requests/s", f"{latency:.1f} s", f"{at:.1f} s", _ratio(at, latency), "-")
            )
    return rows


def replica_table(*, num_requests: int = 256, clients: int = 16, replicas: Sequence[int] = REPLICAS) -> list[str]:
    """Lines of Markdown: throughput of 1 to 16 replicas with proportional clients and requests. The paper: 16.2 at 16."""
    cost = paper_cost()
    rows, base = [], 0.0
    for n in replicas:
        load = closed_loop(clients * n, num_requests=num_requests * n, mean_prompt=2600, mean_output=60)
        result = simulate(load, paper_config("splitfuse", cost), cost, num_replicas=n)
        rate = len(result.requests) / (result.seconds - min(r.start for r in result.requests))
        base = base or rate / n
        rows.append((n, clients * n, f"{rate:.2f}/s", f"{rate / base:.1f}"))
    return table(("replicas", "clients", "throughput", "throughput relative to one replica"), rows)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "only SplitFuse" if a else "neither"
