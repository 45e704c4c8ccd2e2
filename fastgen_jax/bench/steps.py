"""The cost of a step on this device, as a model in its tokens and the contexts that they attend to.

Runs steps of known composition through the engine itself (generation at several contexts, prompts alone, and both together)
under sustained load, and fits: seconds = a straight line in the tokens for each compiled size (constant where padding is
computed; native CPU kernels skip padding) + a per row of logits + b per position that a generated token attends to + c per
position that a prompt token attends to. `fastgen simulate --costs` reads the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.bench.options import add_engine_arguments, make_engine
from fastgen_jax.bench.results import measured_context
from fastgen_jax.bench.tables import table
from fastgen_jax.json_types import JsonObject
from fastgen_jax.plan.roofline import step_shape

if TYPE_CHECKING:
    from fastgen_jax import Engine


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured step: its size, and the quantities that determine its cost."""

    size: int
    """Tokens of the compiled step that ran."""
    num_tokens: int
    num_sample_rows: int
    decode_attended: float
    prompt_attended: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_engine_arguments(parser)
    add_measurement_arguments(parser, rounds=2)
    parser.add_argument("-o", "--output", type=Path, help="file for the cost model (default: only print it)")


def add_measurement_arguments(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Adds the flags of `measure`."""
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[32, 256, 512],
        metavar="TOKENS",
        help="contexts at which generation is measured (default: 32 256 512)",
    )
    parser.add_argument("--generated", type=int, default=12, help="steps per batch of sequences (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="repetitions of the measurement (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measures, fits, prints and writes the cost model."""
    engine = make_engine(args)
    points = measure(engine, contexts=args.contexts, generated=args.generated, rounds=args.rounds)
    model = fit(points, facts_of(engine, args.model))
    print("\n".join(report(points, model)))
    if args.output:
        args.output.write_text(json.dumps(model, indent=1))
    return 0


def measure(engine: Engine, *, contexts: Sequence[int], generated: int, rounds: int) -> list[Point]:
    """Runs batches of known composition and returns their steps, without those that follow an idle device."""
    from fastgen_jax.bench.driver import StepLog

    limit = engine.config.max_context_len - generated - 1
    contexts = sorted({min(context, limit) for context in contexts})
    sizes = engine.config.budget_ladder
    widths = _widths(engine.config.max_num_seqs, sizes)
    ends = sorted({max(1, size * quarters // 4) for size in sizes for quarters in (2, 3, 4)})
    points: list[Point] = []
    with StepLog(engine) as log:
        for _ in range(rounds):
            for width in widths:
                for length in contexts:
                    if width <= engine.config.groups.sequences(engine.config.num_blocks, length + generated):
                        _batch(engine, [length] * width, generated)
            # Prompts alone: their steps attend to growing contexts, and the last one has every size, full or half full.
            for length in (limit, *(min(limit, max(sizes) + end) for end in ends)):
                _batch(engine, [length], 1)
            # Prompts together with generation, in all proportions.
            _batch(engine, [contexts[-1] - 7 * i % contexts[-1] for i in range(engine.config.max_num_seqs)], generated)
    for before, step in zip(log.steps, log.steps[1:], strict=False):
        if step.start > before.read:  # the device was idle before, so this step is not like the others
            continue
        shape = step_shape([chunk[1:] for chunk in step.chunks], step.num_sample_rows, engine.config.windows)
        size = sizes[bisect_left(sizes, step.num_tokens)]
        points.append(
            Point(
                size=size,
                num_tokens=step.num_tokens,
                num_sample_rows=step.num_sample_rows,
                decode_attended=shape.decode_attended,
                prompt_attended=shape.prompt_attended,
                seconds=step.seconds,
            )
        )
    return points


def _widths(max_num_seqs: int, sizes: Sequence[int]) -> list[int]:
    """Numbers of sequences to generate with: powers of two, those that fill a compiled size, and the maximum."""
    powers = [1 << i for i in range(max_num_seqs.bit_length())]
    return sorted({width for width in (*powers, *sizes, max_num_seqs) if width <= max_num_seqs})


def _batch(engine: Engine, lengths: Sequence[int], generated: int) -> None:
    from fastgen_jax.bench.driver import exactly

    rng = np.random.default_rng(len(lengths) + sum(lengths))
    for length in lengths:
        engine.add(rng.integers(0, engine.model.vocab_size, max(1, length)).tolist(), exactly(generated))
    while engine.has_work:
        engine.step()


FEATURES = ("num_sample_rows", "decode_attended", "prompt_attended")
OUTLIER = 1.5  # times the expected duration: other programs used the CPU


def fit(points: Sequence[Point], facts: JsonObject) -> JsonObject:
    """The cost model as a JSON object, fitted by least absolute relative errors with non-negative coefficients.

    Absolute rather than squared errors, because a disturbed step is always slower and never faster; a second fit omits
    outliers. A compiled size that never ran is interpolated from its neighbors. Raises ValueError for fewer points than
    unknowns.
    """
    measured = sorted({point.size for point in points})
    names = [name for name in FEATURES if any(getattr(point, name) for point in points)]
    if len(points) < 2 * len(measured) + len(names):
        raise ValueError(
            f"{len(points)} steps were measured, fewer than the {2 * len(measured) + len(names)} unknowns; raise "
            "--generated or --rounds"
        )
    columns = [[float(point.size == size) for point in points] for size in measured]
    columns += [[float(point.size == size) * point.num_tokens for point in points] for size in measured]
    columns += [[float(getattr(point, name)) for point in points] for name in names]
    seconds = np.array([point.seconds for point in points])
    matrix = np.array(columns).T
    # If a size always held the same number of tokens, its slope and its base cannot be separated.
    free = [i for i in range(matrix.shape[1]) if i < len(measured) or len(set(columns[i]) - {0.0}) > 1]
    values = _not_negative(matrix, seconds, free)
    usual = seconds <= OUTLIER * (matrix @ values)
    values = _not_negative(matrix[usual], seconds[usual], free)
    found = dict(zip(names, values[2 * len(measured) :].tolist(), strict=True))
    sizes = facts["engine"]["step_sizes"]
    base, per_token = (np.interp(sizes, measured, part) for part in np.split(values[: 2 * len(measured)], 2))
    errors = np.abs(matrix @ values / seconds - 1)
    return {
        "sizes": list(sizes),
        "base": base.tolist(),
        "per_token": per_token.tolist(),
        "per_row": found.get("num_sample_rows", 0.0),
        "per_decode_attended": found.get("decode_attended", 0.0),
        "per_prompt_attended": found.get("prompt_attended", 0.0),
        "host_seconds": facts["host_seconds"],
        "facts": {
            **facts,
            "num_points": len(points),
            "num_outliers": int((~usual).sum()),
            "median_error": float(np.median(errors)),
        },
    }


def _not_negative(matrix: np.ndarray, seconds: np.ndarray, free: Sequence[int]) -> np.ndarray:
    """Non-negative coefficients of `matrix`; only those in `free` may differ from 0."""
    free = list(free)
    values = np.zeros(matrix.shape[1])
    while True:  # drop the most negative coefficient and fit again
        solution = _least_absolute(matrix[:, free], seconds)
        if solution.min() >= 0:
            break
        free.pop(int(solution.argmin()))
    values[free] = solution
    return values


def _least_absolute(matrix: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients of least absolute relative errors, by iteratively reweighted least squares."""
    weights = 1 / seconds
    solution = np.zeros(matrix.shape[1])
    for _ in range(30):  # converges linearly and reaches the noise level much earlier
        solution = np.linalg.lstsq(matrix * weights[:, None], seconds * weights, rcond=None)[0]
        scale = np.maximum(matrix @ solution, 0.1 * seconds)
        relative = np.abs(matrix @ solution - seconds) / scale
        weights = 1 / (scale * np.sqrt(np.maximum(relative, 0.01)))  # errors within 1 % count the same
    return solution


def expected(model: JsonObject, point: Point) -> float:
    """Seconds of a step according to the model."""
    index = model["sizes"].index(point.size)
    seconds = model["base"][index] + model["per_token"][index] * point.num_tokens + model["per_row"] * point.num_sample_rows
    return seconds + (
        model["per_decode_attended"] * point.decode_attended + model["per_prompt_attended"] * point.prompt_attended
    )


def facts_of(engine: Engine, model: str) -> JsonObject:
    """Model, engine settings and machine of the measurement."""
    config, snapshot = engine.config, engine.metrics.snapshot()
    return {
        "model": model,
        "host_seconds": (snapshot["plan_ms"] + snapshot["pack_ms"] + snapshot["dispatch_ms"]) / 1e3,
        "engine": {
            "step_sizes": list(config.budget_ladder),
            "max_num_seqs": config.max_num_seqs,
            "num_blocks": config.num_blocks,
            "block_size": config.block_size,
            "windows": list(config.windows),
            "max_context_len": config.max_context_len,
            "overlap": config.choices.overlap,
            "dtype": config.dtype,
            "quantize": config.quantize,
        },
        **measured_context(),
    }


def report(points: Sequence[Point], model: JsonObject) -> list[str]:
    """Lines of Markdown: the time of a step against its tokens (FastGen's first insight), the cost model, and its errors."""
    rows = []
    for size, base, per_token in zip(model["sizes"], model["base"], model["per_token"], strict=True):
        here = [p for p in points if p.size == size]
        full = [p for p in here if p.num_tokens > 0.9 * size]
        median = 1e3 * statistics.median(p.seconds for p in full) if full else None
        rate = f"{size / median * 1e3:.0f}" if median else "-"
        rows.append(
            (
                size,
                len(here),
                "-" if median is None else f"{median:.1f}",
                rate,
                f"{1e3 * base:.1f}",
                f"{1e6 * per_token:.0f}",
            )
        )
    kinds: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for p in points:
        kind = "prompts" if not p.decode_attended else "both" if p.prompt_attended else "generation"
        kinds.setdefault((p.size, kind), []).append((p.seconds, expected(model, p) / p.seconds - 1))
    return [
        *table(("tokens", "steps measured", "full step, median ms", "tokens/s", "base ms", "us per token"), rows),
        "",
        f"{1e6 * model['per_row']:.1f} us per row of logits, {1e9 * model['per_decode_attended']:.1f} ns per position "
        f"attended in generation, {1e9 * model['per_prompt_attended']:.2f} ns in prompts, "
        f"{1e3 * model['host_seconds']:.2f} ms host; median "
        f"error {model['facts']['median_error']:.1%} over {model['facts']['num_points']} "
        f"steps, {model['facts']['num_outliers']} of them disturbed",
        "",
        *table(
            ("size", "contents", "steps", "median ms", "error of the model, quartiles"),
            [
                (
                    size,
                    kind,
                    len(pairs),
                    f"{1e3 * statistics.median(seconds for seconds, _ in pairs):.1f}",
                    " ".join(f"{q:+.1%}" for q in np.percentile([error for _, error in pairs], (25, 50, 75))),
                )
                for (size, kind), pairs in sorted(kinds.items())
            ],
        ),
    ]
