"""Which step sizes are worth a program, by the measured cost of a step against its tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen_jax import paths
from fastgen_jax.engine import saved_choices
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params

log = logging.getLogger(__name__)

FILE = "budgets.json"

GOOD_ENOUGH = 1.05  # cost per token relative to the best; a larger budget would add latency without throughput
ROOM_FOR_PROMPTS = 4  # tokens in a step for each sequence that may generate
WORTH_A_PROGRAM = 0.9  # of the time that the next larger program takes for the same tokens


def choose_budget(seconds: Mapping[int, float], *, max_num_seqs: int) -> int:
    """The smallest budget whose cost per token is within 5% of the best, among those with room for prompts.

    `seconds` maps a budget in tokens to the measured seconds of a full step. A step must hold four tokens per sequence
    that may generate, if any measured step does: the tokens of generating sequences are not available to prompts.
    """
    roomy = {budget: cost / budget for budget, cost in seconds.items() if budget >= ROOM_FOR_PROMPTS * max_num_seqs}
    per_token = roomy or {max(seconds): seconds[max(seconds)] / max(seconds)}
    best = min(per_token.values())
    return min(budget for budget, cost in per_token.items() if cost <= GOOD_ENOUGH * best)


def choose_ladder(
    seconds: Mapping[int, float], token_budget: int, *, seconds_within: Callable[[int, int], float]
) -> tuple[int, ...]:
    """The budgets up to `token_budget` whose full step is clearly cheaper than the same step in the next larger program.

    `seconds_within(budget, num_tokens)` measures a step of `num_tokens` in the program of `budget`: where padding is
    cheap, as with the CPU kernels, few programs are worth compiling.
    """
    kept = [token_budget]
    for budget in sorted((b for b in seconds if b < token_budget), reverse=True):
        if seconds[budget] <= WORTH_A_PROGRAM * seconds_within(kept[-1], budget):
            kept.append(budget)
    return tuple(reversed(kept))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A ladder that was measured once and is reused by later starts."""

    model: str
    machine: str
    versions: str
    when: str
    """UTC, ISO 8601."""
    ladder: tuple[int, ...]
    """Tokens, smallest first; the last is the token budget."""
    seconds: dict[int, float]
    """Seconds of a full step by its tokens, from which the ladder was chosen."""


def known(named: str | None = None) -> list[Measurement]:
    """The saved measurements of all models and machines; `named` as `compile_cache_dir`."""
    folder = paths.engine_dir(named)
    entries = {} if folder is None else saved_choices.load_all(folder / FILE)
    return [measurement for entry in entries.values() if (measurement := _measurement(entry)) is not None]


def forget(named: str | None = None) -> int:
    """Removes all measurements, so that the next start of each model measures; returns how many there were."""
    folder = paths.engine_dir(named)
    return 0 if folder is None else saved_choices.clear(folder / FILE)


def load_choice(path: Path, facts: object) -> tuple[int, ...] | None:
    """The ladder saved for `facts` on this machine with these versions, or None if there is none or it is damaged."""
    entry = saved_choices.load(path, facts)
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


def save_choice(path: Path, facts: object, ladder: Sequence[int], seconds: Mapping[int, float], *, model: str) -> None:
    """Saves a ladder with its measured seconds in a file that holds one entry for each machine and `facts`."""
    saved_choices.save(
        path,
        facts,
        {
            "model": model,
            "ladder": list(ladder),
            "seconds": {str(budget): cost for budget, cost in sorted(seconds.items())},
        },
    )


def describe(model: ModelConfig) -> str:
    """A short description of the model for readers of the file; its name is not known here."""
    return f"{model.family}, {model.num_layers} layers, {count_params(model) / 1e6:,.0f} M parameters"


def _measurement(entry: JsonFields) -> Measurement | None:
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
