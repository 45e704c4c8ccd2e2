"""Same request, same tokens, to the last bit: many seeds, alone and in batches, in programs of every shape.

    python -m tests.engine.same_tokens --seeds 3000         # on sotu-1m; prints how many differ, of how many

On a CPU with native kernels nothing may differ, neither a token nor a bit of its log-probability.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastgen_jax import Engine, SamplingParams
from tests.tiny import drain

LADDERS: dict[str, dict[str, Any]] = {
    "small programs": {"token_budget": 32, "budget_ladder": (1, 2, 4)},
    "odd sizes, preempted": {"token_budget": 23, "budget_ladder": (7,), "num_blocks": 40},
    "every size": {"token_budget": 12, "budget_ladder": tuple(range(1, 12))},
    "one program": {"token_budget": 64, "budget_ladder": ()},
    "token by token": {"token_budget": 1, "budget_ladder": ()},
    "no overlap, other blocks": {"token_budget": 16, "budget_ladder": (2,), "overlap": False, "block_size": 8},
}


class Answer(NamedTuple):
    """What must not change: tokens and log-probabilities, of the model and of the prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def request(seed: int, vocab_size: int) -> tuple[list[int], SamplingParams]:
    """A prompt and sampling parameters that depend only on `seed`."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, vocab_size, int(rng.integers(1, 30))).tolist()
    limits: dict[str, Any] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"repetition_penalty": 1.2}][seed % 5]
    return prompt, SamplingParams(
        max_new_tokens=12, ignore_eos=True, seed=seed, temperature=(0.7, 1.0, 1.5)[seed % 3], logprobs=0, **limits
    )


def answers(engine: Engine, seeds: Sequence[int], *, concurrency: int) -> dict[int, Answer]:
    """The answer for each seed, with `concurrency` requests in the engine at a time."""
    found: dict[int, Answer] = {}
    for start in range(0, len(seeds), concurrency):
        ids = {}
        for seed in seeds[start : start + concurrency]:
            prompt, params = request(seed, engine.model.vocab_size)
            ids[engine.add(prompt, params)] = seed
        for request_id, outputs in drain(engine).items():
            entries = [entry for output in outputs for entry in output.logprobs or ()]
            found[ids[request_id]] = Answer(tuple(e.token_id for e in entries), tuple(e.logprob for e in entries))
    return found


def scores(engine: Engine, given: dict[int, Answer], *, concurrency: int) -> dict[int, Answer]:
    """The answers once more, each read as a prompt whose tokens are scored."""
    found: dict[int, Answer] = {}
    seeds = list(given)
    for start in range(0, len(seeds), concurrency):
        ids = {}
        for seed in seeds[start : start + concurrency]:
            prompt, _ = request(seed, engine.model.vocab_size)
            scored = SamplingParams(max_new_tokens=1, ignore_eos=True, do_sample=False, prompt_logprobs=0)
            ids[engine.add([*prompt, *given[seed].tokens], scored)] = seed
        for request_id, outputs in drain(engine).items():
            entries = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)[-len(given[ids[request_id]].tokens) :]
            found[ids[request_id]] = Answer(tuple(e.token_id for e in entries), tuple(e.logprob for e in entries))
    return found


def different(make: Callable[..., Engine], num_seeds: int, ladders: Sequence[str] = tuple(LADDERS)) -> dict[str, int]:
    """How many seeds get another answer than alone in the first ladder's programs, for each other way to run them."""
    seeds = range(num_seeds)
    first = make(**LADDERS[ladders[0]])
    alone = answers(first, seeds, concurrency=1)

    def count(others: dict[int, Answer]) -> int:
        return sum(others[seed] != alone[seed] for seed in seeds)

    found = {
        "in a batch": count(answers(first, seeds, concurrency=64)),
        "scored": count(scores(first, alone, concurrency=1)),
        "scored in a batch": count(scores(first, alone, concurrency=16)),
    }
    for name in ladders[1:]:
        other = make(**LADDERS[name])
        found[name] = count(answers(other, seeds, concurrency=64))
        if "preempted" in name and num_seeds > 8:
            assert other.scheduler.stats.num_preemptions > 0, "nothing was preempted, so nothing was tested"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sotu-1m", help="a checkpoint (default: sotu-1m)")
    parser.add_argument("--seeds", type=int, default=3000, help="number of requests (default: 3000)")
    options = parser.parse_args()

    def make(**settings: Any) -> Engine:
        settings = {"num_blocks": 400, "block_size": 4, "max_num_seqs": 16, "max_context_len": 128, **settings}
        settings["background_compile"] = False  # the step sizes are what is tested
        return Engine.from_pretrained(options.model, **settings)

    found = different(make, options.seeds)
    for name, count in found.items():
        print(f"{name:28s} {count} of {options.seeds} differ")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
