"""An engine on several devices gives the tokens of an engine on one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastgen_jax import EngineConfig
from fastgen_jax.engine.config import resolve
from tests.tiny import tiny_model

SETUP = """
import numpy as np
from fastgen_jax import Engine, EngineConfig, Research, SamplingParams
from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.engine.config import resolve
from fastgen_jax.engine.weights import prepare_leaf
from tests.tiny import HOME, drain, greedy, tiny_model, tokens_of

PROMPTS = [np.random.default_rng(size).integers(3, 60, size).tolist() for size in (1, 5, 21, 34)]
SAMPLED = SamplingParams(max_new_tokens=6, temperature=1.5, seed=5, ignore_eos=True, repetition_penalty=1.3)
SMALL = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}

def tokens(params, model, **options):
    engine = Engine(params, model, EngineConfig(**SMALL, **options))
    if "tensor_parallel" in options:
        for array in (engine.runner.kv_cache.k.values if "kv_dtype" in options else engine.runner.kv_cache.k,
                      engine.runner.params["embed"]):
            assert array.addressable_shards[0].data.size * options["tensor_parallel"] == array.size
    ids = [engine.add(prompt, params) for params in (greedy(6), SAMPLED) for prompt in PROMPTS]
    outputs = drain(engine)
    assert engine.metrics.compiles_while_serving == 0
    research = Research(engine)
    research.put(["a"], [PROMPTS[1]])
    research.fork("a", "b")
    logits = research.put(["a", "b", "as a", "as b"], [[5], [7], [*PROMPTS[1], 5], [*PROMPTS[1], 7]])
    np.testing.assert_allclose(logits[:2], logits[2:], atol=1e-5)  # one row and six are other tiles of a product
    return [tokens_of(outputs[request_id]) for request_id in ids]
"""

# Weights and cache in 8 bits, and weights that are divided while they are loaded. Native kernels may round activations,
# plain XLA does not: layers are stacked on one device too.
IN_8_BITS = """
params, model = tiny_model("default")
options = {"quantize": "int8", "kv_dtype": "int8"}
resolved = resolve(EngineConfig(**SMALL, **options, tensor_parallel=2), model)
loaded = load_params(open_checkpoint(HOME / "default"), dtype="float32", stack_layers=True,
                     prepare=lambda spec, array: prepare_leaf(spec, array, model, resolved))
assert tokens(loaded, model, **options, tensor_parallel=2) == tokens(params, model, **options, stack_layers=True)
"""
TIED_EMBEDDINGS = """
params, model = tiny_model("multi_head_tied")
assert tokens(params, model, tensor_parallel=4) == tokens(params, model)
"""
EXPERTS = """
for family in ("qwen2_moe", "gpt_oss"):  # routed and shared ones; biases and a clamped activation
    checkpoint = open_checkpoint(HOME.parent / "families" / family / "default")
    params = load_params(checkpoint, dtype="float32")
    assert tokens(params, checkpoint.config, tensor_parallel=2) == tokens(params, checkpoint.config), family
"""


def run(program: str) -> None:
    """Runs a program in a process of its own: the number of devices is fixed when JAX starts."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SETUP + program + "print('equal')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_tokens_do_not_depend_on_the_number_of_devices() -> None:
    run(IN_8_BITS)


@pytest.mark.slow
@pytest.mark.parametrize("program", [TIED_EMBEDDINGS, EXPERTS])
def test_tokens_of_other_models_do_not_depend_on_the_number_of_devices(program: str) -> None:
    run(program)


def test_more_devices_than_there_are_are_refused_with_the_remedy() -> None:
    _, model = tiny_model()
    with pytest.raises(ValueError, match=r"tensor_parallel=2 but this process has 1 cpu device.*device_count=2"):
        resolve(EngineConfig(tensor_parallel=2), model)


def test_layers_apart_cannot_be_divided() -> None:
    _, model = tiny_model()
    with pytest.raises(ValueError, match="tensor_parallel=1 with stack_layers=False is not supported"):
        resolve(EngineConfig(tensor_parallel=1, stack_layers=False), model)
