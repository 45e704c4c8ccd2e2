"""Which step sizes are worth a program, by the cost of a step against its tokens: modeled, or measured on request."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgen_jax import devices, paths
from fastgen_jax.engine import saved_choices
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params, flops_per_token

log = logging.getLogger(__name__)

FILE = "budgets.json"

GOOD_ENOUGH = 1.05  # cost per token relative to the best; a larger budget would add latency without throughput
ROOM_FOR_PROMPTS = 4  # tokens in a step for each sequence that may generate
WORTH_A_PROGRAM = 0.9  # of the time that the next larger program takes for the same tokens

# Operations of matrix products in the time in which one byte of weights is read. Measured with two cores: 8 (Zen 4, 219
# GFLOP/s and 26 GB/s) and 13 (Zen 5). More precision is not needed: the sizes chosen for 6 and for 24 are the same.
CPU_FLOPS_PER_BYTE = 12.0
FEW_ROWS = 16  # tokens: there is always a program for a lightly loaded engine, which samples few rows of logits
PADDED_ROW = 0.01  # cost of a row that native kernels skip, relative to a computed one: what is left to XLA


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The time of a step in units of the time in which the weights are read once."""

    knee: float
    """Tokens whose matrix products take as long as reading the weights."""
    skips_padding: bool
    """Whether the kernels compute only the rows in use, as native CPU kernels do."""

    def __call__(self, num_tokens: int, *, within: int) -> float:
        """The time of a step of `num_tokens` in a program for `within`.

        Reading and multiplying overlap in part: the hypotenuse is between the longer of the two and their sum.
        """
        padding = within - num_tokens
        if self.skips_padding:
            return math.hypot(num_tokens / self.knee, 1.0) + PADDED_ROW * padding / self.knee
        return math.hypot(within / self.knee, 1.0)

    def fitted(self, seconds: Mapping[tuple[int, int], float]) -> tuple[CostModel, float]:
        """The model that is nearest to measured steps, and the seconds of its unit.

        `seconds` maps (tokens, size of the program) to the time of a step; it has at least one entry. The knee is changed by
        a factor of 4 at most, so that noise in a few small steps does not decide about large ones.
        """
        best = (math.inf, self, 0.0)
        for eighth in sorted(range(-16, 17), key=abs):  # the unchanged knee wins if all are equally near, as for one step
            model = replace(self, knee=self.knee * 2 ** (eighth / 8))
            units = [math.log(took / model(tokens, within=size)) for (tokens, size), took in seconds.items()]
            spread = statistics.pvariance(units)
            if spread < best[0] - 1e-9:
                best = (spread, model, math.exp(statistics.fmean(units)))
        return best[1:]


def cost_model(model: ModelConfig, *, bytes_per_weight: float, device_kind: str | None, skips_padding: bool) -> CostModel:
    """The cost of steps on a device, by its data sheet; an unknown accelerator counts as an A100, None is a CPU.

    Devices of a tensor-parallel mesh divide both the products and the weights, so their number does not matter.
    """
    if device_kind is None:
        flops_per_byte = CPU_FLOPS_PER_BYTE
    else:
        device = devices.reported(device_kind) or devices.DEVICES["a100"]
        flops_per_byte = device.flops_per_s / device.memory_bytes_per_s
    operations = bytes_per_weight * count_params(model) * flops_per_byte  # while the weights are read
    return CostModel(knee=operations / flops_per_token(model, sampled=False), skips_padding=skips_padding)


def modeled_ladder(cost: CostModel, candidates: Sequence[int], *, max_num_seqs: int) -> tuple[int, ...]:
    """The step sizes among `candidates` that are worth a program, smallest first; the last is the token budget."""
    full = {budget: cost(budget, within=budget) for budget in candidates}
    within = lambda budget, num_tokens: cost(num_tokens, within=budget)  # noqa: E731
    return choose(full, max_num_seqs=max_num_seqs, seconds_within=within)


def choose(
    seconds: Mapping[int, float], *, max_num_seqs: int, seconds_within: Callable[[int, int], float]
) -> tuple[int, ...]:
    """The step sizes that are worth a program, smallest first; the arguments are those of the next two functions."""
    budget = choose_budget(seconds, max_num_seqs=max_num_seqs)
    few = max((size for size in seconds if size <= FEW_ROWS), default=budget)
    return tuple(sorted({few, *choose_ladder(seconds, budget, seconds_within=seconds_within)}))


def choose_budget(seconds: Mapping[int, float], *, max_num_seqs: int) -> int:
    """The smallest budget whose cost per token is within 5% of the best, among those with room for prompts.

    `seconds` maps a budget in tokens to the time of a full step, in any unit. A step must hold four tokens per sequence
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

    `seconds_within(budget, num_tokens)` is the time of a step of `num_tokens` in the program of `budget`: where padding is
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
    entries = [entry for folder in paths.engine_dirs(named) for entry in saved_choices.load_all(folder / FILE).values()]
    return [measurement for entry in entries if (measurement := _measurement(entry)) is not None]


def forget(named: str | None = None) -> int:
    """Removes all measurements, so that starts use the modeled step sizes; returns how many there were."""
    return sum(saved_choices.clear(folder / FILE) for folder in paths.engine_dirs(named))


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
