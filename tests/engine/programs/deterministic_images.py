"""Without native kernels: with `deterministic` no answer depends on other requests, some with images and some without.

PALLAS_KERNELS_NATIVE=0 python -m tests.engine.programs.deterministic_images gemma3 9 [devices=2]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fastgen_jax import Engine, SamplingParams
from pallas_kernels import native
from tests.engine.same_tokens import Answer
from tests.models.vision.reference import HOME, pictures
from tests.tiny import drain

SIZES: dict[str, Any] = {"num_blocks": 256, "max_num_seqs": 8, "block_size": 4, "max_context_len": 128, "attention": "xla"}
WORDS = ["What", "is", "in", "a"]


def request(folder: Any, seed: int) -> tuple[list[dict[str, Any]], list[Image.Image], SamplingParams]:
    """Words with up to two images among them, which depend only on `seed`; every third request has none."""
    rng = np.random.default_rng(seed)
    shown = [pictures(folder)[i] for i in rng.integers(0, 2, seed % 3)]
    content: list[dict[str, Any]] = [{"type": "text", "text": "What"}]
    for _ in range(len(shown) + 1):
        content.append({"type": "text", "text": " ".join(rng.choice(WORDS, int(rng.integers(1, 4))))})
        content.append({"type": "image"})
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, seed=seed, temperature=1.0, logprobs=0)
    return [{"role": "user", "content": content[:-1]}], shown, params


def answers(engine: Engine, folder: Any, seeds: Sequence[int], *, concurrency: int) -> dict[int, Answer]:
    """The answer for each seed, with `concurrency` requests in the engine at a time."""
    found: dict[int, Answer] = {}
    for start in range(0, len(seeds), concurrency):
        ids = {}
        for seed in seeds[start : start + concurrency]:
            messages, shown, params = request(folder, seed)
            ids[engine.add(messages, params, images=shown)] = seed
        for request_id, outputs in drain(engine).items():
            entries = [entry for output in outputs for entry in output.logprobs or ()]
            found[ids[request_id]] = Answer(tuple(e.token_id for e in entries), tuple(e.logprob for e in entries))
    return found


def differences(folder: Any, num_seeds: int, **settings: Any) -> dict[str, int]:
    """How many answers are others than those of the request alone in an engine without a prefix cache."""
    seeds = range(num_seeds)

    def make(**options: Any) -> Engine:
        return Engine.from_pretrained(folder, **{**SIZES, "background_compile": False, **settings, **options})

    alone = answers(make(prefix_caching=False), folder, seeds, concurrency=1)
    engine, crowded = make(), make(num_blocks=52)
    found = {
        "among others": answers(engine, folder, seeds, concurrency=num_seeds),
        "cached": answers(engine, folder, seeds, concurrency=5),
        "preempted": answers(crowded, folder, seeds, concurrency=num_seeds),
    }
    assert crowded.scheduler.stats.num_preemptions > 0, "nothing was preempted, so nothing was tested"
    assert engine.metrics.compiles_while_serving == 0
    return {how: sum(given[seed] != alone[seed] for seed in seeds) for how, given in found.items()}


def main() -> None:
    assert not native.available(), "set PALLAS_KERNELS_NATIVE=0"
    folder, num_seeds = HOME / sys.argv[1], int(sys.argv[2])
    options = dict(argument.split("=") for argument in sys.argv[3:])
    devices = {"tensor_parallel": int(options["devices"])} if options else {}
    found = differences(folder, num_seeds, deterministic=True, token_budget=24, **devices)
    print(found)
    assert not any(found.values()), found
    if not devices:
        without = differences(folder, num_seeds, token_budget=24, budget_ladder=(7,))
        print(without)
        assert any(without.values()), "the test cannot fail: nothing differs without the option either"


if __name__ == "__main__":
    main()
