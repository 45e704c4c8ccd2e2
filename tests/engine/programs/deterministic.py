"""Without native kernels: with `deterministic` no answer depends on other requests; without it, some do."""

from __future__ import annotations

import sys
from typing import Any

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.models import state_scan
from pallas_kernels import native
from tests.engine.same_tokens import answers
from tests.models.parity import load
from tests.tiny import tiny_engine

SIZES: dict[str, Any] = {"num_blocks": 256, "max_num_seqs": 8, "block_size": 4, "max_context_len": 128, "attention": "xla"}
FEW = {"num_blocks": 40}


def make(family: str, **settings: Any) -> Engine:
    if family == "tiny":
        return tiny_engine(**settings)
    params, config = load(family, "default", stack_layers=True)
    return Engine(params, config, EngineConfig(**{"dtype": "float32", **settings}))


def differences(family: str, num_seeds: int, **settings: Any) -> dict[str, int]:
    """How many answers are others than those of the request alone in an engine without a prefix cache."""
    seeds = range(num_seeds)
    alone = answers(make(family, **{**SIZES, **settings, "prefix_caching": False}), seeds, concurrency=1)
    engine = make(family, **{**SIZES, **settings})
    crowded = make(family, **{**SIZES, **settings, **FEW})
    found = {
        "among others": answers(engine, seeds, concurrency=num_seeds),
        "cached": answers(engine, seeds, concurrency=5),
        "preempted": answers(crowded, seeds, concurrency=num_seeds),
    }
    assert crowded.scheduler.stats.num_preemptions > 0, "nothing was preempted, so nothing was tested"
    return {how: sum(given[seed] != alone[seed] for seed in seeds) for how, given in found.items()}


def main() -> None:
    assert not native.available(), "set PALLAS_KERNELS_NATIVE=0"
    family, num_seeds = sys.argv[1], int(sys.argv[2])
    options = dict(argument.split("=") for argument in sys.argv[3:])
    if (together := options.pop("together", None)) is not None:  # as on an accelerator
        run = state_scan._run
        state_scan._run = lambda *arguments, form, group: run(*arguments, form=form, group=int(together))
    found = differences(family, num_seeds, deterministic=True, token_budget=23, budget_ladder=(), **options)
    print(found)
    assert not any(found.values()), found
    if family == "tiny" and not options:
        without = differences(family, num_seeds, token_budget=23, budget_ladder=(7,))
        print(without)
        assert any(without.values()), "the test cannot fail: nothing differs without the option either"


if __name__ == "__main__":
    main()
