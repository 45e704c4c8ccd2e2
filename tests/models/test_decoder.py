"""The decoder against transformers, on tiny random checkpoints with every rotary scaling and bias."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.core import KVCache, RaggedBatch
from fastgen_jax.models import step
from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.counts import count_params
from fastgen_jax.models.decoder import forward
from fastgen_jax.models.params import init_params
from pallas_kernels.ragged_attention import RaggedIndex, ragged_attention
from tests.tiny import VARIANTS, expected, tiny_model

BLOCK_SIZE = 4
NUM_BLOCKS = 40
# Two float32 programs that sum in different orders; transformers' own cached decode differs from its full forward
# by as much.
LOGIT_TOLERANCE = 1e-4


def run_chunks(params, config: ModelConfig, token_ids, sizes) -> np.ndarray:
    """Logits of every position, with the prompt split into chunks of `sizes`."""
    cache = KVCache.zeros(
        num_layers=config.num_layers,
        num_blocks=NUM_BLOCKS,
        num_kv_heads=config.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=config.head_dim,
        dtype=jnp.float32,
    )
    table = np.random.default_rng(0).permutation(NUM_BLOCKS).astype(np.int32)
    program = jax.jit(partial(forward, config=config), donate_argnums=1)
    rows, start = [], 0
    for size in sizes:
        positions = np.arange(start, start + size, dtype=np.int32)
        batch = RaggedBatch(
            token_ids=jnp.asarray(token_ids[start : start + size], jnp.int32),
            token_slots=jnp.full(size, 1, jnp.int32),
            positions=jnp.asarray(positions),
            rope_lengths=jnp.maximum(len(token_ids), jnp.asarray(positions) + 1),
            index=RaggedIndex(
                kv_slots=jnp.asarray(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE),
                query_starts=jnp.asarray([0, size], jnp.int32),
                context_lens=jnp.asarray([start + size], jnp.int32),
                block_tables=jnp.asarray(table[None]),
            ),
            sample_rows=jnp.arange(size, dtype=jnp.int32),
            num_sample_rows=jnp.asarray(size, jnp.int32),
        )
        logits, cache = program(params, cache, batch)
        rows.append(np.asarray(logits))
        start += size
    return np.concatenate(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant):
    params, config = tiny_model(variant)
    want = expected(variant)
    got = run_chunks(params, config, want["token_ids"], [len(want["token_ids"])])
    np.testing.assert_allclose(got, want["logits"], atol=LOGIT_TOLERANCE * np.abs(want["logits"]).max(), rtol=0)


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("default", [1] * 5 + [70]),
        ("default", [32, 32, 11]),
        ("rope_dynamic", [7, 61, 7]),
        ("rope_yarn", [1] * 5 + [70]),
        pytest.param("default", [7, 61, 7], marks=pytest.mark.slow),
        pytest.param("rope_dynamic", [32, 32, 11], marks=pytest.mark.slow),
    ],
)
def test_chunking_a_prompt_does_not_change_its_logits(variant, sizes):
    params, config = tiny_model(variant)
    want = expected(variant)
    got = run_chunks(params, config, want["token_ids"], sizes)
    np.testing.assert_allclose(got, want["logits"], atol=LOGIT_TOLERANCE * np.abs(want["logits"]).max(), rtol=0)


def test_scanned_layers_compute_what_unrolled_layers_compute():
    params, config = tiny_model()
    stacked, _ = tiny_model(stack_layers=True)
    token_ids = expected()["token_ids"]
    unrolled = run_chunks(params, config, token_ids, [75])
    np.testing.assert_allclose(run_chunks(stacked, config, token_ids, [75]), unrolled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["default", "rope_yarn"])
def test_attention_that_rotates_computes_the_same(variant, monkeypatch):
    params, config = tiny_model(variant)
    token_ids = expected(variant)["token_ids"]
    before = run_chunks(params, config, token_ids, [70, 5])
    given = []

    def attend(*arguments, **options):
        given.append(arguments[-1].rotation)
        return ragged_attention(*arguments, **options)

    monkeypatch.setattr(step, "rotates_while_writing", lambda *_, **__: True)  # as on a GPU
    monkeypatch.setattr(step, "ragged_attention", attend)
    np.testing.assert_allclose(run_chunks(params, config, token_ids, [70, 5]), before, atol=1e-5, rtol=0)
    assert given
    assert None not in given


def test_bfloat16_stays_near_float32():
    params, config = tiny_model()
    half = jax.tree_util.tree_map(lambda x: x.astype(jnp.bfloat16), params)
    want = expected()["logits"]
    got = run_chunks(half, config, expected()["token_ids"], [75])
    # 8 significant bits through two layers with weights of standard deviation 0.3
    assert np.abs(got - want).mean() < 0.03 * np.abs(want).max()


def test_parameters_are_counted_as_they_are_made():
    for tie in (False, True):
        config = replace(tiny_model()[1], tie_embeddings=tie, qkv_bias=tie, o_bias=tie, mlp_bias=tie)
        params = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        assert count_params(config) == sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 is not a multiple of num_kv_heads=2"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny_model()[1], **changes)


def test_a_scaling_without_its_original_length_is_refused():
    with pytest.raises(ValueError, match="needs original_max_position"):
        RopeConfig(kind="yarn", factor=2.0)
