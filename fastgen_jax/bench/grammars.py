"""Tokens per second of streams that a grammar holds, beside free streams in the same steps.

    fastgen bench grammars --model smollm2-135m-instruct

Two loads alternate: free streams alone, and as many streams of which half must write JSON. All of them sample. Both halves
of the second load are in the same steps, so their rates differ if a held stream samples in fewer steps; and its free half is
slower than in the first load if masks delay the steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fastgen_jax.bench.options import add_engine_arguments, make_engine
from fastgen_jax.bench.tables import table
from fastgen_jax.json_types import JsonObject

if TYPE_CHECKING:
    from fastgen_jax import Engine

# Longer than any run: an answer that ends early would leave a shorter step to the others.
SCHEMA: JsonObject = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "email": {"type": "string", "maxLength": 40},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        },
        "required": ["name", "age", "email", "tags"],
        "additionalProperties": False,
    },
}
PROMPT = "Write a list of people as JSON, each with name, age, email and tags.\n"
WARM_UP_STEPS = 4


class Rates(NamedTuple):
    """One run of a load."""

    held: float
    """Tokens per second of all held streams; 0 without any."""
    free: float
    """The same of the free ones."""
    masks: int
    mask_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    add_engine_arguments(parser)
    parser.add_argument("--streams", type=int, default=16, help="held streams, and free ones beside them (default: 16)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per stream (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each load, interleaved (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit code."""
    if min(args.streams, args.rounds) < 1 or args.tokens <= 2 * WARM_UP_STEPS:
        raise ValueError(
            f"--streams is {args.streams}, --rounds {args.rounds} and --tokens {args.tokens}; the first two must be at "
            f"least 1, and --tokens more than {2 * WARM_UP_STEPS}"
        )
    engine = make_engine(args, max_num_seqs=2 * args.streams)
    print(
        "\n".join(report(measure(engine, streams=args.streams, tokens=args.tokens, rounds=args.rounds, greedy=args.greedy)))
    )
    return 0


def measure(engine: Engine, *, streams: int, tokens: int, rounds: int, greedy: bool) -> Mapping[str, list[Rates]]:
    """The rates of each load, one per round: "alone" with free streams only, and "beside" with half of them held."""
    _run(engine, held=1, free=1, tokens=tokens, seed=0, greedy=greedy)  # the first grammar has its programs compiled
    engine.wait_until_compiled()
    _run(engine, held=streams, free=streams, tokens=tokens, seed=0, greedy=greedy)
    rates: dict[str, list[Rates]] = {"alone": [], "beside": []}
    for seed in range(rounds):
        rates["alone"].append(_run(engine, held=0, free=2 * streams, tokens=tokens, seed=seed, greedy=greedy))
        rates["beside"].append(_run(engine, held=streams, free=streams, tokens=tokens, seed=seed, greedy=greedy))
    return rates


def report(rates: Mapping[str, Sequence[Rates]]) -> Iterator[str]:
    """Lines of Markdown, and the ratios in whole sentences."""
    alone, beside = rates["alone"], rates["beside"]
    rows = [
        ("free streams alone", "-", _medians(run.free for run in alone), "-"),
        (
            "half of them held",
            _medians(run.held for run in beside),
            _medians(run.free for run in beside),
            f"{1e3 * median(run.mask_seconds / run.masks for run in beside):.3f}",
        ),
    ]
    yield from table(("load", "held streams, tokens/s", "free streams, tokens/s", "a mask, ms"), rows)
    ratios = sorted(run.held / run.free for run in beside)
    both = sorted((run.held + run.free) / before.free for before, run in zip(alone, beside, strict=True))
    yield ""
    yield f"held / free in the same steps: {median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
    yield f"all streams, half of them held / free ones alone: {median(both):.3f} ({both[0]:.3f}-{both[-1]:.3f})"


def _run(engine: Engine, *, held: int, free: int, tokens: int, seed: int, greedy: bool) -> Rates:
    from fastgen_jax import SamplingParams
    from fastgen_jax.text.grammar import Grammar

    grammar = Grammar.json_schema(SCHEMA)
    kinds: dict[str, bool] = {}
    for number in range(held + free):
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        if not greedy:
            params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=1.0, seed=1000 * seed + number)
        request_id = engine.add(f"{number}. {PROMPT}", params, grammar=grammar if number < held else None)
        kinds[request_id] = number < held
    generated = dict.fromkeys(kinds, 0)
    counts = {True: 0, False: 0}
    masks, seconds = engine.metrics.masks, engine.metrics.mask_seconds
    start = None
    while engine.has_work:
        outputs = engine.step()
        for output in outputs:
            generated[output.request_id] = output.num_generated_tokens
            if start is not None:
                counts[kinds[output.request_id]] += len(output.new_token_ids)
        if any(output.finished for output in outputs):
            break
        if start is None and min(generated.values()) > WARM_UP_STEPS:  # from here on every stream generates
            start = time.perf_counter()
    took = time.perf_counter() - (start or 0.0)
    for request_id in kinds:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    return Rates(
        counts[True] / took, counts[False] / took, engine.metrics.masks - masks, engine.metrics.mask_seconds - seconds
    )


def _medians(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{median(ordered):,.1f} ({ordered[0]:,.1f}-{ordered[-1]:,.1f})"
