"""Host time per step in milliseconds, against the number of generating sequences.

    fastgen bench host --sequences 32 256

The model is random and has a few thousand parameters, so that steps are short; the host's work for a step does not depend
on the model.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgen_jax.engine.metrics import StepTimes

PROMPT_LENGTH, WARM_UP_STEPS = 40, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 32, 256], help="numbers of sequences (default: 1 32 256)"
    )
    parser.add_argument("--steps", type=int, default=300, help="measured steps for each of them (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit code."""
    if min(args.sequences) < 1 or args.steps < 1:
        raise ValueError(f"--sequences is {args.sequences} and --steps {args.steps}; both must be at least 1")
    print(f"{'sequences':>10} {'plan':>8} {'pack':>8} {'commit':>8} {'sum, ms':>8} {'outputs':>8} {'dispatch':>8}")
    for count in args.sequences:
        steps = _measure(count, args.steps)
        plan, pack, commit, output, dispatch = (
            [step.seconds(phase) for step in steps] for phase in ("plan", "pack", "commit", "output", "dispatch")
        )
        total = [sum(parts) for parts in zip(plan, pack, commit, strict=True)]
        medians = (1e3 * median(values) for values in (plan, pack, commit, total, output, dispatch))
        print(f"{count:10d} " + " ".join(f"{value:8.3f}" for value in medians))
    return 0


def _measure(count: int, steps: int) -> list[StepTimes]:
    """The last `steps` steps, in each of which `count` sequences generate one token."""
    import jax

    from fastgen_jax.bench.driver import exactly
    from fastgen_jax.engine import Engine, EngineConfig
    from fastgen_jax.models.config import ModelConfig
    from fastgen_jax.models.params import init_params

    length = PROMPT_LENGTH + WARM_UP_STEPS + steps + count  # prompts are computed one after another
    model = ModelConfig(
        family="llama",
        vocab_size=64,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=16,
        max_context_len=length,
    )
    engine = Engine(
        init_params(model, jax.random.key(0)),
        model,
        EngineConfig(
            token_budget=max(512, 2 * count),
            budget_ladder=(),
            max_num_seqs=count,
            compile_cache_dir="",
            num_blocks=count * -(-length // 32) + 1,
        ),
    )
    params = exactly(length - PROMPT_LENGTH)
    for number in range(count):
        engine.add([(number + i) % 64 for i in range(PROMPT_LENGTH)], params)
    timeline = engine.metrics.timeline
    while not timeline or timeline[-1].num_generating < count:
        engine.step()
    for _ in range(WARM_UP_STEPS + steps):
        engine.step()
    return list(timeline)[-steps:]
