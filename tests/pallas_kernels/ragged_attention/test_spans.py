"""Attention in both directions within spans equals softmax over the keys that the definition names."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_attention import SPAN_QUERIES, CacheLayer, RaggedIndex, Scoring, ragged_attention, with_spans

H, K, D, BLOCK, N = 4, 2, 8, 4, 80
TOLERANCE = 1e-5


def dense(q, keys, values, positions, last, window):
    """[T, H, D] for queries at `positions` that see the keys (position - window, last]."""
    scores = np.einsum("tkgd,jkd->kgtj", q.reshape(len(q), K, H // K, D), keys) / np.sqrt(D)
    place = np.arange(len(keys))[None]
    seen = (place <= last[:, None]) & (place > positions[:, None] - window)
    scores = np.where(seen[None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("kgtj,jkd->tkgd", weights, values).reshape(q.shape)


@pytest.mark.parametrize("window", [1000, 6])
def test_tokens_of_a_span_see_all_of_it_and_their_window_before_it(window):
    rng = np.random.default_rng(0)
    length = SPAN_QUERIES + 11
    # Two sequences of `length`; of the first, `cached` tokens are in the cache, with the begin of its span.
    cached, spans = 7, [(5, 5 + length // 2), (3, length)]
    draw = partial(rng.standard_normal, dtype=np.float32)
    keys, values = draw((2, length, K, D)), draw((2, length, K, D))
    tables = rng.permutation(N)[: 2 * -(-length // BLOCK)].reshape(2, -1).astype(np.int32)
    cache = np.full((2, N, K, BLOCK, D), np.nan, np.float32)
    for j in range(cached):
        for part, source in enumerate((keys, values)):
            cache[part, tables[0, j // BLOCK], :, j % BLOCK] = source[0, j]
    counts = [length - cached, length]
    sequence = np.repeat([0, 1], counts)
    positions = np.concatenate([np.arange(cached, length), np.arange(length)])
    q = draw((len(positions), H, D))
    index = RaggedIndex(
        kv_slots=jnp.asarray(tables[sequence, positions // BLOCK] * BLOCK + positions % BLOCK),
        query_starts=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
        context_lens=jnp.full(2, length, jnp.int32),
        block_tables=jnp.asarray(tables),
    )
    last, rows = positions.copy(), []
    for s, (start, stop) in enumerate(spans):
        inside = np.flatnonzero((sequence == s) & (positions >= start) & (positions < stop))
        last[inside] = stop - 1
        rows += [
            (s, part[0], len(part), stop - positions[part[0]])
            for part in np.split(inside, range(SPAN_QUERIES, len(inside), SPAN_QUERIES))
        ]
    padded = np.zeros((8, 4), np.int32)
    padded[: len(rows)] = rows
    attend = with_spans(partial(ragged_attention, implementation="xla"), jnp.asarray(padded))
    out, _, _ = jax.jit(attend)(
        jnp.asarray(q),
        jnp.asarray(keys[sequence, positions]),
        jnp.asarray(values[sequence, positions]),
        jnp.asarray(cache[0]),
        jnp.asarray(cache[1]),
        index,
        CacheLayer(number=0, num_blocks=N),
        Scoring(scale=1 / np.sqrt(D), sliding_window=window),
    )
    want = np.concatenate(
        [dense(q[sequence == s], keys[s], values[s], positions[sequence == s], last[sequence == s], window) for s in (0, 1)]
    )
    np.testing.assert_allclose(out, want, atol=TOLERANCE)
