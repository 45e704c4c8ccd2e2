"""Where device time goes under each policy: the reasons for the ratios in the paper's table."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen_jax.bench.loads import closed_loop
from fastgen_jax.bench.tables import table
from fastgen_jax.simulation.paper import TOKEN_BUDGETS, paper_config, paper_cost
from fastgen_jax.simulation.replica import StepRecord
from fastgen_jax.simulation.simulator import simulate


def timeline_table(*, clients: int = 16, num_requests: int = 256, prompt: int = 2600, output: int = 60) -> list[str]:
    """Lines of Markdown: duration and tokens of steps with and without prompts, and how long generation pauses."""
    rows = []
    cost = paper_cost()
    for policy in TOKEN_BUDGETS:
        load = closed_loop(clients, num_requests=num_requests, mean_prompt=prompt, mean_output=output)
        result = simulate(load, paper_config(policy, cost), cost, record_steps=True)
        steps = result.steps[0]
        mixed = [step for step in steps if step.num_tokens > len(step.chunks)]
        alone = [step for step in steps if step.num_tokens == len(step.chunks)]
        busy = sum(_seconds(step) for step in steps)
        rows.append(
            (
                policy,
                f"{sum(map(_seconds, mixed)) / busy:.0%}",
                _step(mixed),
                _step(alone),
                f"{sum(step.num_tokens for step in steps) / busy:.0f}",
                _pause(steps),
                f"{1 - busy / (steps[-1].end - steps[0].start):.0%}",
            )
        )
    return table(
        (
            "policy",
            "device time in steps with prompts",
            "such a step: tokens, ms",
            "a step without: tokens, ms",
            "tokens/s of device time",
            "longest generation pause, ms: mean, max",
            "device idle",
        ),
        rows,
    )


def _seconds(step: StepRecord) -> float:
    return step.end - step.start


def _step(steps: Sequence[StepRecord]) -> str:
    if not steps:
        return "-"
    n = len(steps)
    return f"{sum(s.num_tokens for s in steps) / n:.0f}, {1e3 * sum(map(_seconds, steps)) / n:.0f}"


def _pause(steps: Sequence[StepRecord]) -> str:
    """Mean and maximum over requests of the longest time between two steps that generate a token of the request."""
    last: dict[str, float] = {}
    longest: dict[str, float] = {}
    for step in steps:
        for name, _, length in step.chunks:
            if length == 1:
                if name in last:
                    longest[name] = max(longest.get(name, 0.0), step.end - last[name])
                last[name] = step.end
    pauses = list(longest.values())
    return f"{1e3 * sum(pauses) / len(pauses):.0f}, {1e3 * max(pauses):.0f}" if pauses else "-"
