"""The cache is updated in place: no compiled program copies the pool."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ragged_attention import CacheLayer, Latents, QuantizedCache, RaggedIndex, Scoring, ragged_attention
from pallas_kernels.ragged_attention.cpu import call as cpu

needs_native = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
NUM_LAYERS, NUM_BLOCKS = 30, 8
POOL = (NUM_LAYERS * NUM_BLOCKS, 3, 16, 64)


def program(implementation: str | None, *, num_layers: int, scanned: bool, latents: Latents | None) -> Callable:
    def run(x, caches, index):
        def one_layer(state, layer):
            x, (k_cache, v_cache) = state
            kv = x[:, ::3]
            out, *caches = ragged_attention(
                x,
                kv,
                kv,
                k_cache,
                v_cache,
                index,
                CacheLayer(number=layer, num_blocks=NUM_BLOCKS),
                Scoring(scale=0.125, latents=latents),
                implementation=implementation,
            )
            return (x + out, tuple(caches)), None

        state = (x, caches)
        if scanned:
            return jax.lax.scan(one_layer, state, jnp.arange(num_layers, dtype=jnp.int32))[0]
        for layer in range(num_layers):
            state, _ = one_layer(state, layer)
        return state

    return run


def compile_step(
    implementation: str | None,
    *,
    num_tokens: int,
    num_layers: int,
    scanned: bool,
    quantized: bool = False,
    latents: Latents | None = None,
) -> jax.stages.Compiled:
    f32, i32 = jnp.float32, jnp.int32
    pool = jax.ShapeDtypeStruct(POOL, f32)
    if quantized:
        pool = jax.eval_shape(lambda: QuantizedCache.zeros(POOL, jnp.int8))
    index = RaggedIndex(
        kv_slots=jax.ShapeDtypeStruct((num_tokens,), i32),
        query_starts=jax.ShapeDtypeStruct((5,), i32),
        context_lens=jax.ShapeDtypeStruct((4,), i32),
        block_tables=jax.ShapeDtypeStruct((4, 6), i32),
    )
    x = jax.ShapeDtypeStruct((num_tokens, 9, 64), f32)
    run = program(implementation, num_layers=num_layers, scanned=scanned, latents=latents)
    return jax.jit(run, donate_argnums=1).lower(x, (pool, None if latents else pool), index).compile()


def copies_of_the_pool(compiled: jax.stages.Compiled, dtype: str = "f32", pool: tuple[int, ...] = POOL) -> list[str]:
    """Instructions that copy, start to copy, or rearrange an array with as many elements as the pool."""
    flat = f"{dtype}[{math.prod(pool)}]"
    shapes = [f"{dtype}[{','.join(map(str, pool))}]", flat]
    pattern = re.compile(
        r"= \(?(" + "|".join(map(re.escape, shapes)) + r")\S* (copy|copy-start|transpose|concatenate|pad)\("
    )
    return [line.strip() for line in compiled.as_text().splitlines() if pattern.search(line)]


@pytest.mark.parametrize(
    ("implementation", "num_layers", "scanned", "num_tokens"),
    [
        *(
            pytest.param("cpu", NUM_LAYERS, scanned, num_tokens, marks=needs_native)
            for scanned in (False, True)
            for num_tokens in (1, 2, 40)
        ),
        (None, NUM_LAYERS, True, 1),
        (None, NUM_LAYERS, True, 40),
        ("xla", NUM_LAYERS, True, 1),  # each of these takes seconds to compile
        ("xla", NUM_LAYERS, True, 40),
        ("xla", 2, False, 1),
    ],
)
def test_no_program_copies_the_pool(implementation: str | None, num_layers: int, scanned: bool, num_tokens: int) -> None:
    compiled = compile_step(implementation, num_tokens=num_tokens, num_layers=num_layers, scanned=scanned)
    assert copies_of_the_pool(compiled) == []
    pool_bytes = 4 * POOL[0] * POOL[1] * POOL[2] * POOL[3]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes


def test_a_program_over_8_bits_copies_neither_the_pool_nor_its_scales() -> None:
    compiled = compile_step("xla", num_tokens=40, num_layers=NUM_LAYERS, scanned=True, quantized=True)
    assert copies_of_the_pool(compiled, "s8") == copies_of_the_pool(compiled, "f32", POOL[:-1]) == []
    pool_bytes = math.prod(POOL) + 4 * math.prod(POOL[:-1])
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * pool_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * pool_bytes  # tiles in float32, not both pools


@pytest.mark.parametrize("implementation", ["xla", pytest.param("cpu", marks=needs_native)])
def test_latents_are_one_pool_that_no_program_copies(implementation: str) -> None:
    latents = Latents(key_dim=64, value_dim=48)
    compiled = compile_step(implementation, num_tokens=40, num_layers=NUM_LAYERS, scanned=True, latents=latents)
    assert copies_of_the_pool(compiled) == []
    pool_bytes, memory = 4 * math.prod(POOL), compiled.memory_analysis()
    assert pool_bytes <= memory.alias_size_in_bytes < 1.2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes


def test_the_search_for_copies_finds_one_without_donation() -> None:
    pool = jax.ShapeDtypeStruct(POOL, jnp.float32)
    compiled = jax.jit(lambda pool: pool.at[3, 0, 0, 0].set(1.0)).lower(pool).compile()
    assert copies_of_the_pool(compiled) != []
