"""Which step sizes are worth a program: read off a measured curve of step cost against tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen_jax import paths
from fastgen_jax.engine import remembered
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params

log = logging.getLogger(__name__)

FILE = "budgets.json"

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


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A ladder that was measured once and is used in later starts."""

    model: str
    machine: str
    versions: str
    when: str
    """UTC, ISO 8601."""
    ladder: tuple[int, ...]
    """Tokens, smallest first; the last is the token budget."""
    seconds: dict[int, float]
    """Seconds of a full step by its tokens: the curve that the ladder was read off."""


def known(named: str | None = None) -> list[Measurement]:
    """The measurements that are remembered, of all models and machines; `named` as `compile_cache_dir`."""
    folder = paths.engine_dir(named)
    entries = {} if folder is None else remembered.everything(folder / FILE)
    return [measurement for entry in entries.values() if (measurement := _measurement(entry)) is not None]


def forget(named: str | None = None) -> int:
    """Forgets all measurements, so that the next start of each model measures; returns how many there were."""
    folder = paths.engine_dir(named)
    return 0 if folder is None else remembered.forget(folder / FILE)


def load_choice(path: Path, facts: Any) -> tuple[int, ...] | None:
    """The ladder saved for `facts` on this machine with these versions, or None if there is none or it is damaged."""
    entry = remembered.recall(path, facts)
    measurement = None if entry is None else _measurement(entry)
    if measurement is None:
        return None
    log.info(
        "step sizes %s, measured %s (%s); remeasure=True measures again",
        ", ".join(map(str, measurement.ladder)),
        measurement.when,
        path,
    )
    return measurement.ladder


def save_choice(path: Path, facts: Any, ladder: Sequence[int], seconds: Mapping[int, float], *, model: str) -> None:
    """Keeps a ladder, with the curve that it was read off, in a file that holds one for each machine and `facts`."""
    remembered.remember(
        path,
        facts,
        {
            "model": model,
            "ladder": list(ladder),
            "seconds": {str(budget): cost for budget, cost in sorted(seconds.items())},
        },
    )


def describe(model: ModelConfig) -> str:
    """A model in a few words, for people who read the file: its name is not known here."""
    return f"{model.family}, {model.num_layers} layers, {count_params(model) / 1e6:,.0f} M parameters"


def _measurement(entry: Mapping[str, Any]) -> Measurement | None:
    """An entry of the file, or None if it is damaged."""
    try:
        ladder = tuple(int(budget) for budget in entry["ladder"])
        if not ladder or min(ladder) < 1 or list(ladder) != sorted(set(ladder)):
            return None
        seconds = {int(budget): float(cost) for budget, cost in entry["seconds"].items()}
        texts = {name: str(entry[name]) for name in ("model", "machine", "versions", "when")}
        return Measurement(ladder=ladder, seconds=seconds, **texts)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
