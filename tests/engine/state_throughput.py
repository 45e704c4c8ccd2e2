"""Throughput of a model with states in most layers beside a dense one with as many parameters: interleaved, random weights.

    python -m tests.engine.state_throughput --rounds 5                           # about 45 million parameters each, float32
    python -m tests.engine.state_throughput --llama-cpp ~/llama/bin/python       # and llama.cpp with the same shapes

"prompts" are tokens of prompts per second, with one new token each; "generating" are new tokens per second. Ratios are those
of the medians. For llama.cpp, PYTHON has llama-cpp-python and gguf installed; each of its models runs in its own process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fastgen_jax import Engine, EngineConfig, SamplingParams
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.families import family_of
from fastgen_jax.models.params import init_params
from fastgen_jax.models.state_config import Mamba2
from tests.gate.models import GRANITE_4_H_MICRO, LLAMA_3_8B

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


class LlamaCpp:
    """llama.cpp with random weights of a model's shapes."""

    def __init__(self, python: str, model: ModelConfig, *, requests: int, context: int):
        sizes = {
            "kind": "llama" if model.state is None else "granitehybrid",
            "vocab": model.vocab_size,
            "layers": model.num_layers,
            "width": model.embed_dim,
            "mlp": model.mlp_dim,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "attends": [i in model.attending_layers for i in range(model.num_layers)],
            "requests": requests,
            "context": context,
        }
        state = model.state
        if state is not None:
            assert isinstance(state, Mamba2)
            sizes |= {"inner": state.inner_dim, "ssm_heads": state.num_heads, "state": state.state_dim}
            sizes |= {"groups": state.num_groups, "conv": state.width}
        program = Path(__file__).parent / "programs" / "llama_cpp_rates.py"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, program, json.dumps(sizes)], stdin=pipe, stdout=pipe, text=True)
        self.num_params = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self.process.wait()}")
        return line

    def run(self, requests: int, prompt_tokens: int, new_tokens: int) -> float:
        """Seconds for so many requests."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{requests} {prompt_tokens} {new_tokens}\n")
        self.process.stdin.flush()
        return float(self._line())


def run(engine: Engine, requests: int, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds for so many requests."""
    rng = np.random.default_rng(requests)
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
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python and gguf")
    options = parser.parse_args()
    choices = EngineConfig(
        dtype="float32",
        token_budget=256,
        budget_ladder=(16,),
        max_num_seqs=options.requests,
        max_context_len=1024,
        num_blocks=1024,
        block_size=16,
        prefix_caching=False,
        background_compile=False,
    )
    runs: dict[str, Callable[[int, int, int], float]] = {}
    for name, model in models(options.layers, options.width).items():
        engine = Engine(init_params(model, jax.random.key(0), dtype="float32"), model, choices)
        runs[name] = functools.partial(run, engine)
        print(f"{name}: {count_params(model):,} parameters")
        if options.llama_cpp:
            peer = LlamaCpp(options.llama_cpp, model, requests=options.requests, context=1024)
            runs[f"{name}, llama.cpp"] = peer.run
            print(f"{name}, llama.cpp: {peer.num_params:,} parameters")
    loads = {"prompts": (options.requests, options.prompt_tokens, 1)}
    loads |= {"one generating": (1, 16, options.new_tokens), "all generating": (options.requests, 16, options.new_tokens)}
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        for load, (requests, prompt, new) in loads.items():
            for name in sorted(runs, reverse=number % 2 == 1):
                seconds = runs[name](requests, prompt, new)
                if number:  # the first round warms up
                    tokens = requests * (prompt if load == "prompts" else new)
                    rates.setdefault((load, name), []).append(tokens / seconds)
    for load in loads:
        medians = {name: statistics.median(rates[load, name]) for name in runs}
        print(f"{load}: " + ", ".join(f"{rate:,.1f} tokens/s {name}" for name, rate in medians.items()))
        compared = [("states", "dense")]
        if options.llama_cpp:
            compared += [(name, f"{name}, llama.cpp") for name in ("states", "dense")]
            compared.append(("states, llama.cpp", "dense, llama.cpp"))
        for name, other in compared:
            print(f"    {name} / {other}: {medians[name] / medians[other]:.3f}")


if __name__ == "__main__":
    main()
