"""Choice of keys and attention to them compared with NumPy, on ragged batches, with NaN in the unused parts of the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_attention import CacheLayer, RaggedIndex
from pallas_kernels.sparse_attention import IndexQueries, LatentCache, attend, choose, sparse_tokens

RANK, ROPE, INDEX, HEADS, INDEX_HEADS = 6, 2, 4, 3, 5
WIDTH, BLOCK, NUM_BLOCKS, CHOSEN, SCALE = RANK + INDEX, 4, 45, 7, 0.3
TOLERANCE = 1e-5  # float32 sums in different orders


def _problem(packed: bool, whole_numbers: bool, seed: int = 0):
    """A batch of a short context, a long chunk, generating sequences and padding, and the keys of each sequence."""
    rng = np.random.default_rng(seed)
    queries, contexts = [3, 11, 1, 1, 0], [5, 33, 30, 4, 0]
    num_tokens = sum(queries) + 2
    tables = rng.permutation(NUM_BLOCKS).reshape(5, 9)
    draw = (lambda *shape: rng.integers(-1, 2, shape)) if whole_numbers else (lambda *shape: rng.standard_normal(shape))
    k, v = np.full((2, 2 * NUM_BLOCKS, 1, BLOCK, WIDTH), np.nan, np.float32)
    for row, context in enumerate(contexts):
        for j in range(context):
            place = NUM_BLOCKS + tables[row, j // BLOCK], 0, j % BLOCK
            latent = draw(RANK)
            k[place] = [*latent, *draw(ROPE), *np.zeros(INDEX - ROPE)]
            v[place] = [*latent, *draw(INDEX)]
    positions = np.concatenate([np.arange(c - q, c) for q, c in zip(queries, contexts, strict=True)] + [np.zeros(2)])
    index = RaggedIndex(
        kv_slots=jnp.zeros(num_tokens, jnp.int32),
        query_starts=jnp.asarray(np.cumsum([0, *queries]), jnp.int32),
        context_lens=jnp.asarray(contexts, jnp.int32),
        block_tables=jnp.asarray(tables, jnp.int32),
    )
    cache = LatentCache(
        k=jnp.asarray(np.concatenate([k, v], axis=-1) if packed else k),
        v=None if packed else jnp.asarray(v),
        tables=index.block_tables,
        layer=CacheLayer(number=jnp.int32(1), num_blocks=NUM_BLOCKS),
        rank=RANK,
    )
    asked = IndexQueries(
        queries=jnp.asarray(draw(num_tokens, INDEX_HEADS, INDEX), jnp.float32),
        weights=jnp.asarray(draw(num_tokens, INDEX_HEADS), jnp.float32),
    )
    q = jnp.asarray(rng.standard_normal((num_tokens, HEADS, WIDTH)), jnp.float32)
    rows = np.repeat(np.arange(5), queries)
    return cache, asked, q, index, jnp.asarray(positions, jnp.int32), rows, (k, v, tables)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whole_numbers", [False, True], ids=["distinct", "ties"])
def test_the_best_keys_are_chosen_and_attended_to_and_ties_go_to_the_earlier_key(packed: bool, whole_numbers: bool):
    cache, asked, q, index, positions, rows, (k, v, tables) = _problem(packed, whole_numbers)
    tokens = sparse_tokens(index, positions, CHOSEN)
    before = jnp.full((len(positions), CHOSEN), -1, jnp.int32)
    chosen = np.asarray(jax.jit(choose)(asked, cache, tokens, before))
    out = np.asarray(jax.jit(attend, static_argnames="scale")(q, cache, tokens, jnp.asarray(chosen), q, scale=SCALE))
    for t in range(len(positions)):
        position = int(positions[t])
        if t >= len(rows) or position < CHOSEN:  # left as they were
            assert (chosen[t] == -1).all()
            np.testing.assert_array_equal(out[t], np.asarray(q)[t])
            continue
        places = [(NUM_BLOCKS + tables[rows[t], j // BLOCK], 0, j % BLOCK) for j in range(position + 1)]
        keys, values = (np.stack([pool[place] for place in places]).astype(np.float64) for pool in (k, v))
        products = np.maximum(np.asarray(asked.queries[t], np.float64) @ values[:, RANK:].T, 0.0)
        scores = np.asarray(asked.weights[t], np.float64) @ products
        want = np.argsort(-scores, kind="stable")[:CHOSEN]
        np.testing.assert_array_equal(chosen[t], want)
        weights = np.exp(SCALE * np.asarray(q[t], np.float64) @ keys[want].T)
        sums = weights / weights.sum(axis=1, keepdims=True) @ keys[want, :RANK]
        np.testing.assert_allclose(out[t, :, :RANK], sums, atol=TOLERANCE)
        assert (out[t, :, RANK:] == 0).all()
