"""Which step sizes are worth a program: read off a measured curve of step cost against tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

GOOD_ENOUGH = 1.05  # cost per token, relative to the best: beyond it a larger budget buys latency, not throughput
WORTH_A_PROGRAM = 0.85  # a smaller step must take at most this share of the next larger one's time


def choose_budget(seconds: Mapping[int, float]) -> int:
    """The smallest budget whose cost per token is within 5% of the best: throughput first, then token latency.

    `seconds` maps a budget in tokens to the measured seconds of a full step.
    """
    per_token = {budget: cost / budget for budget, cost in seconds.items()}
    best = min(per_token.values())
    return min(budget for budget, cost in per_token.items() if cost <= GOOD_ENOUGH * best)


def choose_ladder(seconds: Mapping[int, float], token_budget: int) -> tuple[int, ...]:
    """The budgets up to `token_budget` that are clearly cheaper than the next larger one kept."""
    kept = [token_budget]
    for budget in sorted((b for b in seconds if b < token_budget), reverse=True):
        if seconds[budget] <= WORTH_A_PROGRAM * seconds[kept[-1]]:
            kept.append(budget)
    return tuple(reversed(kept))


def load_costs(path: Path, key: str) -> dict[int, float] | None:
    """The curve saved under `key`, or None if there is none or the file cannot be read."""
    try:
        curves = json.loads(path.read_text())
        return {int(budget): float(cost) for budget, cost in curves[key].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def save_costs(path: Path, key: str, seconds: Mapping[int, float]) -> None:
    """Adds a curve to the file, which holds one for each device, model and version."""
    try:
        curves = json.loads(path.read_text())
        if not isinstance(curves, dict):
            curves = {}
    except (OSError, ValueError):
        curves = {}
    curves[key] = {str(budget): cost for budget, cost in sorted(seconds.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: another engine that starts now reads the old file or the new one, never half of it.
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(curves, indent=1))
    scratch.replace(path)
