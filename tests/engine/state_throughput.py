"""Throughput of a model with states in most layers beside a dense one with as many parameters: interleaved, random weights.

python -m tests.engine.state_throughput --rounds 5          # about 45 million parameters each, float32

"prompts" are tokens of prompts per second, with one new token each; "generating" are new tokens per second. The ratio is
that of the medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from fastgen_jax import Engine, EngineConfig, SamplingParams
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.families import family_of
from fastgen_jax.models.params import init_params
from tests.gate.shapes import GRANITE_4_H_MICRO, LLAMA_3_8B

VOCAB = 8192


def models(layers: int, width: int) -> dict[str, ModelConfig]:
    """One attention layer in six with a state, as in Granite 4, and a Llama, whose MLP is as much larger."""
    shape = {"vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    shape |= {"num_key_value_heads": width // 128, "max_position_embeddings": 4096}
    kinds = ["attention" if i % 6 == 5 else "mamba" for i in range(layers)]
    states = {"layer_types": kinds, "shared_intermediate_size": 2 * width, "mamba_n_heads": width // 32}
    hybrid = family_of("GraniteMoeHybridForCausalLM").config_from_hf(GRANITE_4_H_MICRO | shape | states)
    llama = LLAMA_3_8B | shape | {"intermediate_size": 2 * width, "tie_word_embeddings": True}
    dense = family_of("LlamaForCausalLM").config_from_hf(llama)
    missing = count_params(hybrid) - count_params(dense)
    return {"states": hybrid, "dense": dataclasses.replace(dense, mlp_dim=2 * width + missing // (3 * width * layers))}


def run(engine: Engine, requests: int, prompt_tokens: int, new_tokens: int, seed: int) -> float:
    """Seconds for so many requests."""
    rng = np.random.default_rng(seed)
    for _ in range(requests):
        prompt = rng.integers(5, VOCAB, prompt_tokens).tolist()
        engine.add(prompt, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput with and without states, in one run.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    choices = EngineConfig(
        dtype="float32",
        token_budget=256,
        budget_ladder=(16,),
        max_num_seqs=16,
        max_context_len=1024,
        num_blocks=1024,
        block_size=16,
        prefix_caching=False,
        background_compile=False,
    )
    engines = {}
    for name, model in models(options.layers, options.width).items():
        engines[name] = Engine(init_params(model, jax.random.key(0), dtype="float32"), model, choices)
        print(f"{name}: {count_params(model):,} parameters")
    loads = {"prompts": (options.prompt_tokens, 1), "one generating": (16, options.new_tokens)}
    loads["generating"] = (16, options.new_tokens)
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        for load, (prompt, new) in loads.items():
            for name in sorted(engines, reverse=number % 2 == 1):
                requests = 1 if load == "one generating" else options.requests
                seconds = run(engines[name], requests, prompt, new, number)
                if number:  # the first round warms up
                    tokens = requests * (prompt if load == "prompts" else new)
                    rates.setdefault((load, name), []).append(tokens / seconds)
    for load in loads:
        states, dense = (statistics.median(rates[load, name]) for name in ("states", "dense"))
        print(f"{load:15} {states:9.1f} tokens/s with states, {dense:9.1f} dense: {states / dense:.3f}")


if __name__ == "__main__":
    main()
