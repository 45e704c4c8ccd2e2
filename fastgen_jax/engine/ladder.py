"""Which step sizes are worth a program: read off a measured curve of step cost against tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GOOD_ENOUGH = 1.05  # cost per token, relative to the best: beyond it a larger budget buys latency, not throughput
ROOM_FOR_PROMPTS = 4  # tokens of a step for each sequence that may generate
WORTH_A_PROGRAM = 0.9  # a program must take at most this share of what the next larger one takes for its tokens


def choose_budget(seconds: Mapping[int, float], *, max_num_seqs: int) -> int:
    """The smallest budget whose cost per prompt token is within 5% of the best, of those that generation leaves room in.

    `seconds` maps a budget in tokens to the measured seconds of a full step. A step must hold four times as many tokens
    as sequences may generate, if any measured one does: what they take is lost to prompts.
    """
    roomy = {budget: cost / budget for budget, cost in seconds.items() if budget >= ROOM_FOR_PROMPTS * max_num_seqs}
    per_token = roomy or {max(seconds): seconds[max(seconds)] / max(seconds)}
    best = min(per_token.values())
    return min(budget for budget, cost in per_token.items() if cost <= GOOD_ENOUGH * best)


def choose_ladder(
    seconds: Mapping[int, float], token_budget: int, *, seconds_within: Callable[[int, int], float]
) -> tuple[int, ...]:
    """The budgets up to `token_budget` whose full step is clearly cheaper than the same step in the next larger one kept.

    `seconds_within(budget, num_tokens)` measures a step of `num_tokens` in the program of `budget`: where padding costs
    little, as with our CPU kernels, few programs are worth their compilation.
    """
    kept = [token_budget]
    for budget in sorted((b for b in seconds if b < token_budget), reverse=True):
        if seconds[budget] <= WORTH_A_PROGRAM * seconds_within(kept[-1], budget):
            kept.append(budget)
    return tuple(reversed(kept))


def load_choice(path: Path, key: str) -> tuple[int, ...] | None:
    """The ladder saved under `key`, or None if there is none or the file cannot be read."""
    try:
        ladder = tuple(int(budget) for budget in json.loads(path.read_text())[key]["ladder"])
        return ladder or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_choice(path: Path, key: str, ladder: Sequence[int], seconds: Mapping[int, float]) -> None:
    """Adds a ladder, with the curve that it was read off, to the file, which holds one for each device and model."""
    try:
        choices = json.loads(path.read_text())
        if not isinstance(choices, dict):
            choices = {}
    except (OSError, ValueError):
        choices = {}
    choices[key] = {"ladder": list(ladder), "seconds": {str(budget): cost for budget, cost in sorted(seconds.items())}}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: another engine that starts now reads the old file or the new one, never half of it.
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(choices, indent=1))
    scratch.replace(path)
