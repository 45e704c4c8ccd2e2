"""Packed stacks of layers on a CPU: one loop body for any depth, which copies neither the weights nor the cache."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.core import KVCache
from fastgen_jax.engine.config import EngineConfig, resolve
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.runner import step_program
from fastgen_jax.engine.sampling.state import init_state
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.params import init_params
from pallas_kernels import native
from tests.models.parity import Runs, expected, folder, load

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

OPTIONS = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 4}


@cache
def compiled(family: str, variant: str, *, num_layers: int, num_tokens: int, **options) -> jax.stages.Compiled:
    """The step program of a model that is as deep as asked, with random weights."""
    model = replace(open_checkpoint(folder(family, variant)).config, num_layers=num_layers)
    config = resolve(EngineConfig(**OPTIONS, **options), model)
    params = prepare_params(init_params(model, jax.random.key(0)), model, config)
    cache = KVCache.zeros(
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
    program = step_program(model, bucket, activation_dtype=config.activation_dtype)
    packed = jax.ShapeDtypeStruct((bucket.layout.size,), jnp.int32)
    return program.lower(params, cache, init_state(config.max_num_seqs, model.vocab_size), packed).compile()


def instructions(program: jax.stages.Compiled) -> int:
    return sum(" = " in line for line in program.as_text().splitlines())


def copies(program: jax.stages.Compiled, sizes: set[int]) -> list[str]:
    """Instructions that copy, slice or rearrange arrays with so many elements."""
    found = []
    for line in program.as_text().splitlines():
        match = re.search(
            r"= \(?\w+\[([\d,]+)\]\S* (copy|copy-start|dynamic-slice|slice|transpose|concatenate|pad|fusion)\(", line
        )
        if match and math.prod(int(n) for n in match[1].split(",")) in sizes:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_program_does_not_grow_with_depth(num_tokens):
    few, many = (compiled("llama", "default", num_layers=layers, num_tokens=num_tokens) for layers in (4, 12))
    assert instructions(few) == instructions(many)
    # A matrix has one call in the loop and one in the last layer, which runs for the sampled rows only.
    assert many.as_text().count('custom_call_target="pallas_kernels_matmul"') == 2 * 4 + 1
    assert many.memory_analysis().temp_size_in_bytes == few.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_the_loop_copies_neither_the_cache_nor_the_weights(num_tokens, options):
    program = compiled("llama", "default", num_layers=12, num_tokens=num_tokens, **options)
    (params, cache, *_), _ = program.in_avals
    stacks = [leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 5]
    assert len(stacks) == 4
    assert copies(program, {cache.k.size, *stacks, *(size // 12 for size in stacks)}) == []
    assert program.memory_analysis().alias_size_in_bytes >= 2 * cache.k.size * cache.k.dtype.itemsize


def test_the_search_for_copies_finds_those_of_plain_stacks():
    stack = jnp.ones((3, 8, 16))
    program = jax.jit(lambda w, i: jnp.sin(jax.lax.dynamic_index_in_dim(w, i))).lower(stack, 1).compile()
    assert copies(program, {8 * 16}) != []


def packed(family: str, variant: str, **options):
    params, model = load(family, variant)
    config = resolve(EngineConfig(dtype="float32", num_blocks=8, **options), model)
    return prepare_params(params, model, config), model


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "default"),
        ("gemma3", "default"),  # windows and rotations that differ between layers
        ("gpt_oss", "default"),  # experts with biases, sinks
        ("deepseek_v3", "default"),  # latent attention; an MLP, then experts
        ("mixtral", "default"),
    ],
)
def test_scanned_and_unrolled_packed_layers_give_the_same_logits(family, variant):
    tokens, want, prompt = expected(family, variant)
    results = []
    for stack_layers in (True, False):
        params, model = packed(family, variant, stack_layers=stack_layers)
        assert isinstance(params["layers"], dict) == stack_layers
        results.append(Runs(params, model, len(tokens)).logits(tokens, [len(tokens)], prompt_length=prompt))
    np.testing.assert_allclose(*results, atol=1e-5 * np.abs(want).max(), rtol=0)
