"""Without native kernels: with `deterministic` no answer depends on other requests; without it, some do.

    PALLAS_KERNELS_NATIVE=0 python -m tests.engine.programs.deterministic FAMILY REQUESTS [OPTION=VALUE ...]

Options are those of the engine, and `together=N`: sequences whose states are computed together; `devices=N`, for which JAX
must have been told to make so many; `order=ring`: devices add up as in a ring, and some answer must be another.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.models import state_scan
from fastgen_jax.models.sharding import TENSOR
from pallas_kernels import native, ordered_sum
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


def added_in_a_ring(parts: jax.Array) -> jax.Array:
    """Their sum, in which each device begins with the part of another."""
    first, count = jax.lax.axis_index(TENSOR), parts.shape[0]
    total = parts[first]
    for other in range(1, count):
        total = total + parts[(first + other) % count]
    return total


def main() -> None:
    assert not native.available(), "set PALLAS_KERNELS_NATIVE=0"
    family, num_seeds = sys.argv[1], int(sys.argv[2])
    options = dict(argument.split("=") for argument in sys.argv[3:])
    if (together := options.pop("together", None)) is not None:  # as on an accelerator
        run = state_scan._run
        state_scan._run = lambda *arguments, form, group: run(*arguments, form=form, group=int(together))
    devices = {"tensor_parallel": int(options.pop("devices"))} if "devices" in options else {}
    is_ring = options.pop("order", None) == "ring"
    if is_ring:
        ordered_sum._added = added_in_a_ring
        options["compile_cache_dir"] = ""  # programs are saved by the sources that they were made from
    # On several devices, each adds up a share of the rows, of which it has a whole number.
    size = 24 if devices else 23
    found = differences(family, num_seeds, deterministic=True, token_budget=size, budget_ladder=(), **options, **devices)
    print(found)
    assert any(found.values()) == is_ring, found
    if family == "tiny" and not options and not is_ring:
        without = differences(family, num_seeds, token_budget=size, budget_ladder=(7,), **devices)
        print(without)
        assert any(without.values()), "the test cannot fail: nothing differs without the option either"


if __name__ == "__main__":
    main()
