"""Throughput of GRPO's rollouts against that of the offline benchmark's loop, on the same requests, interleaved in one run.

python -m tests.training.rollout_throughput                                   # sotu-1m, the sizes of rollouts.ipynb
python -m tests.training.rollout_throughput --model smollm2-135m-instruct --dtype bfloat16 --rounds 5

A round generates the answers of one GRPO step, three times and in an order that changes: as rollouts, as the same prompts
and numbers of tokens in the loop of `fastgen bench offline` (greedy, ends of sequence ignored), and in that loop with the
sampling of rollouts. Ratios are medians over the rounds; beside them, the same by the processor's time, which other
programs on the machine hardly change. Every run begins with an empty prefix cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastgen_jax import Engine
from fastgen_jax.bench.driver import outputs_of
from fastgen_jax.training import Settings
from fastgen_jax.training.grpo import Group, Rollouts

SIDES = ("rollouts", "offline", "offline, sampled")


def rollouts(engine: Engine, settings: Settings, prompts: list[list[int]]) -> list[Group]:
    """The groups of answers to `prompts`, as a GRPO step generates them."""
    groups = Rollouts(engine, settings)
    for number, prompt in enumerate(prompts):
        groups.start(number, prompt)
    return groups.take(len(prompts))


def offline(engine: Engine, groups: list[Group]) -> None:
    """As many tokens after the same prompts, by the loop of the offline benchmark."""
    answers = [(group, answer) for group in groups for answer in group.answers]
    requests = ((str(i), group.prompt_ids, len(answer.token_ids)) for i, (group, answer) in enumerate(answers))
    for _ in outputs_of(engine, requests):
        pass


def offline_sampled(engine: Engine, settings: Settings, groups: list[Group]) -> None:
    """The same answers once more, with all requests added at once and nothing done with the outputs."""
    whole = Rollouts(engine, settings)
    for group in groups:
        for i in range(settings.group_size):
            engine.add(group.prompt_ids, whole.params_of(group.number, i))
    while engine.has_work:
        engine.step()


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of the processor."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sotu-1m", help="a checkpoint (default: sotu-1m)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=4, help="groups (default: 4)")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="mean length of a prompt (default: 16)")
    parser.add_argument("--new-tokens", type=int, default=24, help="length limit of an answer (default: 24)")
    parser.add_argument("--token-budget", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    engine = Engine.from_pretrained(
        options.model,
        dtype=options.dtype,
        token_budget=options.token_budget,
        budget_ladder=(),
        max_num_seqs=options.prompts * options.group_size,
        block_size=16,
        num_blocks=1024,
        progress=False,
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(options.prompt_tokens // 2, options.prompt_tokens * 3 // 2 + 1, options.prompts)
    prompts = [rng.integers(3, engine.model.vocab_size, length).tolist() for length in lengths]
    settings = Settings(prompts_per_step=options.prompts, group_size=options.group_size, max_new_tokens=options.new_tokens)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(options.rounds + 1):
        of_round = replace(settings, seed=number)
        engine.reset_prefix_cache()
        groups = rollouts(engine, of_round, prompts)  # the lengths of the answers, for all sides
        runs = {
            "rollouts": lambda s=of_round: rollouts(engine, s, prompts),
            "offline": lambda g=groups: offline(engine, g),
            "offline, sampled": lambda s=of_round, g=groups: offline_sampled(engine, s, g),
        }
        for side in (*SIDES[number % len(SIDES) :], *SIDES[: number % len(SIDES)]):
            engine.reset_prefix_cache()
            seconds = timed(runs[side])
            if number:  # the first round warms up
                times[side].append(seconds)
    tokens = sum(len(answer.token_ids) for group in groups for answer in group.answers)
    print(f"{engine.describe()}: {options.prompts} groups of {options.group_size}, about {tokens} tokens per step")
    base = times["offline"]
    for side, found in times.items():
        ratio, by_cpu = (
            statistics.median(b[column] / a[column] for a, b in zip(found, base, strict=True)) for column in (0, 1)
        )
        middle = statistics.median(seconds for seconds, _ in found)
        print(f"{side:17} {1e3 * middle:8.1f} ms  {ratio:.3f} of offline, {by_cpu:.3f} by processor time")


if __name__ == "__main__":
    main()
