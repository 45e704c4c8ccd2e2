"""Heads of two sizes in one cache: where they lie, and that attention does not depend on it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.footprint import block_bytes, token_bytes
from fastgen_jax.models.cache_groups import cache_groups, choose_groups
from fastgen_jax.models.cache_rows import for_share, of_shared_rows, own_part, side_by_side
from fastgen_jax.models.config import FullHeads, ModelConfig
from pallas_kernels.ragged_attention import CacheLayer, RaggedIndex, Scoring, ragged_attention
from tests.models.parity import load

NUM_BLOCKS, BLOCK = 6, 4
SCORING = Scoring(scale=0.3)
INDEX = RaggedIndex(  # two new tokens of a sequence of 7, three of another, and one of padding
    kv_slots=jnp.asarray([5 * BLOCK + 1, 5 * BLOCK + 2, 0, 1, 2, NUM_BLOCKS * BLOCK], jnp.int32),
    query_starts=jnp.asarray([0, 2, 5], jnp.int32),
    context_lens=jnp.asarray([7, 3], jnp.int32),
    block_tables=jnp.asarray([[2, 5], [0, 1]], jnp.int32),
)


def gemma4_31b() -> ModelConfig:
    windows = (*(1024,) * 5, None) * 10
    small = load("gemma4", "keys_as_values")[1]
    sizes = {"num_layers": 60, "num_heads": 32, "num_kv_heads": 16, "head_dim": 256, "max_context_len": 8192}
    return replace(small, **sizes, layer_windows=windows, layer_ropes=(), full_heads=FullHeads(num_kv_heads=4, head_dim=512))


def random(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_a_cache_has_no_more_room_than_the_heads_of_gemma_4_need() -> None:
    config = gemma4_31b()
    assert (config.cache_kv_heads, config.cache_head_dim) == (8, 512)
    assert token_bytes(config, "cpu", kv_dtype="bfloat16") == 2 * 2 * (50 * 16 * 256 + 10 * 4 * 512)
    groups = choose_groups(config, 8192)
    assert (groups.num_rows, groups.windows) == (5, (None, *(1024,) * 10))
    of_block = {"kv_dtype": "bfloat16", "block_size": 64, "num_groups": 11}
    assert block_bytes(config, "tpu", **of_block) == 2 * 2 * 64 * 5 * 16 * 256 == 2 * 2 * 64 * 10 * 4 * 512
    used = list(zip(groups.places, groups.shares, strict=True))
    assert len(set(used)) == 60
    assert {share for (group, _), share in used if group == 0} == {0, 1}
    assert {share for (group, _), share in used if group > 0} == {0}
    one = cache_groups(config, 1)
    assert one.num_rows == 55
    assert len(set(zip(one.places, one.shares, strict=True))) == 60


def test_heads_that_do_not_fit_beside_each_other_are_padded() -> None:
    config = replace(gemma4_31b(), num_kv_heads=1, full_heads=FullHeads(num_kv_heads=1, head_dim=512))
    assert [config.heads_side_by_side(layer) for layer in (0, 5)] == [1, 1]
    assert (config.cache_kv_heads, config.layers_sharing_row(0)) == (1, 1)
    with pytest.raises(ValueError, match="layers of one kind must take a multiple of what the others take"):
        replace(gemma4_31b(), num_kv_heads=4, full_heads=FullHeads(num_kv_heads=5, head_dim=512))


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
def test_attention_of_heads_side_by_side_is_that_of_each(implementation: str | None) -> None:
    q, k, v = random(6, 8, 16, seed=0), random(6, 4, 16, seed=1), random(6, 4, 16, seed=2)
    keys, values = (random(3 * NUM_BLOCKS, 4, BLOCK, 16, seed=seed) for seed in (3, 4))
    layer = CacheLayer(number=1, num_blocks=NUM_BLOCKS)
    want, *_ = ragged_attention(q, k, v, keys, values, INDEX, layer, SCORING, implementation="reference")
    keys, values = (x.reshape(-1, 2, 2, BLOCK, 16).swapaxes(2, 3).reshape(-1, 2, BLOCK, 32) for x in (keys, values))
    q, k, v = side_by_side(q, k, v, 2)
    out, *_ = ragged_attention(q, k, v, keys, values, INDEX, layer, SCORING, implementation=implementation)
    np.testing.assert_allclose(own_part(out, 4, 2)[:5], want[:5], atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("share", [0, 1])
def test_layers_that_share_a_row_change_only_their_own_part_of_it(implementation: str | None, share: int) -> None:
    q, k, v = random(6, 8, 16, seed=0), random(6, 2, 16, seed=1), random(6, 2, 16, seed=2)
    keys, values = (random(3 * NUM_BLOCKS, 4, BLOCK, 16, seed=seed) for seed in (3, 4))
    own = slice(2 * share, 2 * share + 2)
    layer = CacheLayer(number=1, num_blocks=NUM_BLOCKS)
    want, *after = ragged_attention(q, k, v, keys[:, own], values[:, own], INDEX, layer, SCORING, implementation="reference")

    attend = partial(ragged_attention, implementation=implementation)
    index = for_share(INDEX, share, 2, block_size=BLOCK)
    out, *changed = of_shared_rows(attend)(q, k, v, keys, values, index, layer, SCORING)
    np.testing.assert_allclose(out[:5], want[:5], atol=1e-5)
    for cache, new, expected in zip((keys, values), changed, after, strict=True):
        np.testing.assert_array_equal(new, cache.at[:, own].set(expected))
