"""Packed stacks of layers on a CPU: one loop body for any depth, which copies neither the weights nor the cache."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.core import KVCache
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.decoder import Execution, forward
from fastgen_jax.models.params import init_params
from pallas_kernels import native
from tests.models.parity import NUM_BLOCKS, Runs, error, expected, folder, load
from tests.models.test_families import TOLERANCE

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

OPTIONS = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 4}


@cache
def compiled(num_layers: int, num_tokens: int, *, variant: str = "default", **options) -> jax.stages.Compiled:
    """The forward pass of a model with random weights that is as deep as asked."""
    model = replace(open_checkpoint(folder("llama", variant)).config, num_layers=num_layers)
    config = resolve(EngineConfig(**OPTIONS, **options), model)
    params = prepare_params(init_params(model, jax.random.key(0)), model, config)
    kv_cache = KVCache.zeros(
        num_layers=num_layers,
        num_blocks=config.num_blocks,
        num_kv_heads=model.num_kv_heads,
        block_size=config.block_size,
        head_dim=model.head_dim,
        dtype=config.kv_dtype,
    )
    bucket = Bucket(
        num_tokens,
        max_num_seqs=config.max_num_seqs,
        max_blocks=config.max_blocks,
        num_slots=config.num_blocks * config.block_size,
        vocab_size=model.vocab_size,
    )
    batch, _ = jax.eval_shape(bucket.unpack, jax.ShapeDtypeStruct((bucket.layout.size,), jnp.int32))
    run = partial(forward, config=model, execution=Execution(activation_dtype=config.activation_dtype))
    return jax.jit(run, donate_argnums=1).lower(params, kv_cache, batch).compile()


def instructions(program: jax.stages.Compiled) -> int:
    return sum(" = " in line for line in program.as_text().splitlines())


def copies(program: jax.stages.Compiled, sizes: set[int]) -> list[str]:
    """Instructions that copy, slice or rearrange arrays with so many elements."""
    names = "copy|copy-start|dynamic-slice|slice|transpose|concatenate|pad|fusion"
    found = []
    for line in program.as_text().splitlines():
        match = re.search(rf"= \(?\w+\[([\d,]+)\]\S* ({names})\(", line)
        if match and math.prod(int(n) for n in match[1].split(",")) in sizes:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_program_does_not_grow_with_depth(num_tokens):
    few, many = (compiled(num_layers, num_tokens) for num_layers in (4, 12))
    assert instructions(few) == instructions(many)
    # A matrix has one call in the loop and one in the last layer, which runs for the sampled rows only.
    assert many.as_text().count('custom_call_target="pallas_kernels_matmul"') == 2 * 4 + 1
    assert many.memory_analysis().temp_size_in_bytes == few.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_the_loop_copies_neither_the_cache_nor_the_weights(num_tokens, options):
    program = compiled(12, num_tokens, **options)
    (params, kv_cache, *_), _ = program.in_avals
    stacks = [leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 5]
    assert len(stacks) == 4
    assert copies(program, {kv_cache.k.size, *stacks, *(size // 12 for size in stacks)}) == []
    assert program.memory_analysis().alias_size_in_bytes >= 2 * kv_cache.k.size * kv_cache.k.dtype.itemsize


def test_the_search_for_copies_finds_those_of_plain_stacks():
    stack = jnp.ones((3, 8, 16))
    program = jax.jit(lambda w, i: jnp.sin(jax.lax.dynamic_index_in_dim(w, i))).lower(stack, 1).compile()
    assert copies(program, {8 * 16}) != []


@pytest.mark.parametrize(
    ("family", "variant", "stack_layers"),
    [
        ("llama", "default", False),
        ("gemma3", "default", True),  # windows and rotations that differ between layers
        ("gpt_oss", "default", True),  # experts with biases, sinks
        ("deepseek_v3", "default", True),  # latent attention; an MLP, then experts
    ],
)
def test_packed_layers_give_the_logits_of_transformers_scanned_and_unrolled(family, variant, stack_layers):
    params, model = load(family, variant)
    config = resolve(EngineConfig(dtype="float32", num_blocks=8, stack_layers=stack_layers), model)
    params = prepare_params(params, model, config)
    assert isinstance(params["layers"], dict) == stack_layers
    tokens, want, prompt = expected(family, variant)
    got = Runs(params, model, len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt)
    assert error(got, want) < TOLERANCE


@pytest.mark.slow
def test_runs_of_different_layers_are_loops_one_after_another():
    """A loop over layers with an MLP, one over layers with experts, and the last layer."""
    model = open_checkpoint(folder("deepseek_v3", "default")).config
    assert model.moe is not None
    model = replace(model, num_layers=7, moe=replace(model.moe, layers=tuple(range(3, 7))))
    plain = init_params(model, jax.random.key(0))
    tokens = np.arange(3, 20)
    logits = []
    for stack_layers in (True, False):
        config = resolve(EngineConfig(dtype="float32", num_blocks=NUM_BLOCKS, stack_layers=stack_layers), model)
        runs = Runs(prepare_params(plain, model, config), model, len(tokens))
        logits.append(runs.logits(tokens, [9, 8], prompt_length=len(tokens)))
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max(), rtol=0)
