"""Throughput of the model alone, of eight adapters in every batch, and of a model with one merged: interleaved, in one run.

python -m tests.engine.adapter_throughput                     # SmolLM2 in bfloat16; at most two minutes on two slow cores
python -m tests.engine.adapter_throughput --seconds 300       # more rounds
python -m tests.engine.adapter_throughput --model sotu-1m --rank 8

"no places" is an engine without places for adapters, "none" one that has them, with requests that use none. The ratios are
those of the median over rounds; every round runs each load once, in an order that changes. Rounds begin until the time is
up. Beside them, the same by the processor's time, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import numpy as np

from fastgen_jax import Engine, SamplingParams
from fastgen_jax.checkpoint import load_params, open_checkpoint, resolve_model
from fastgen_jax.training import merge_lora
from tests.adapters import random_lora

COUNT = 8
LOADS = {"no places": [None], "none": [None], "one": ["a0"], "eight": [f"a{i}" for i in range(COUNT)], "merged": [None]}


def run(engine: Engine, names: list[str | None], options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Tokens per second, and per second of the processor, of prompts and answers together."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, engine.model.vocab_size, options.prompt_tokens).tolist() for _ in range(options.requests)]
    for prompt, name in zip(prompts, itertools.cycle(names)):
        engine.add(prompt, SamplingParams(max_new_tokens=options.new_tokens, ignore_eos=True, temperature=1.0, adapter=name))
    start, cpu = time.perf_counter(), time.process_time()
    while engine.has_work:
        engine.step()
    tokens = options.requests * (options.prompt_tokens + options.new_tokens)
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput with and without adapters, in one run.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30, help="for rounds, of which one is always run (default: 30)")
    options = parser.parse_args()
    shape = {
        "dtype": options.dtype,
        "token_budget": 64,
        "budget_ladder": (16,),
        "quantize": "none",
        "max_num_seqs": 16,
        "num_blocks": 256,
        "progress": False,
    }
    plain = Engine.from_pretrained(options.model, background_compile=False, **shape)
    adapted = Engine.from_pretrained(
        options.model, background_compile=False, max_adapters=COUNT, max_adapter_rank=options.rank, **shape
    )
    loras = [random_lora(plain.model, seed, rank=options.rank) for seed in range(COUNT)]
    for number, lora in enumerate(loras):
        start = time.perf_counter()
        adapted.load_adapter(f"a{number}", lora, scale=0.01)
        print(f"loading adapter {number}: {time.perf_counter() - start:.3f} s")
    params = load_params(open_checkpoint(resolve_model(options.model)), dtype=options.dtype)
    merged = Engine.from_pretrained(options.model, background_compile=False, **shape)
    merged.update_params(merge_lora(params, loras[0], scale=0.01))
    engines = {"no places": plain, "none": adapted, "one": adapted, "eight": adapted, "merged": merged}
    rates: dict[str, list[tuple[float, float]]] = {load: [] for load in LOADS}
    few = argparse.Namespace(requests=COUNT, prompt_tokens=2, new_tokens=2)
    for engine, names in ((plain, [None]), (adapted, LOADS["eight"]), (merged, [None])):
        run(engine, names, few, 0)  # so that no round contains what happens once
    end, number = time.perf_counter() + options.seconds, 0
    while not number or time.perf_counter() < end:
        number += 1
        for load in [*LOADS][number % len(LOADS) :] + [*LOADS][: number % len(LOADS)]:
            rates[load].append(run(engines[load], LOADS[load], options, number))
    print(f"{number} rounds")
    middle = {load: [statistics.median(column) for column in zip(*found, strict=True)] for load, found in rates.items()}
    for load, (rate, by_cpu) in middle.items():
        base, base_by_cpu = middle["no places"]
        print(
            f"{load:10} {rate:9.1f} tokens/s  {rate / base:.3f} of no places, {by_cpu / base_by_cpu:.3f} by processor time"
        )


if __name__ == "__main__":
    main()
