"""The rows of an index in chunks, compared with a loop over chunks; a block size that does not divide them is refused."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.models.chunks import in_chunks, num_chunk_rows
from pallas_kernels.ragged_attention import RaggedIndex

SIZE, BLOCK = 8, 4
# (first position, tokens of this step) of each sequence; the last row is unused.
BATCHES = (
    [(0, 5), (3, 1), (7, 1), (8, 1), (0, 0)],
    [(0, 8), (8, 8), (6, 3), (0, 0)],
    [(5, 21), (0, 17), (15, 2), (0, 0)],
)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("chunks", BATCHES)
def test_each_chunk_that_a_step_computes_is_a_row(chunks, windowed):
    queries = np.array([count for _, count in chunks])
    starts = np.concatenate([[0], np.cumsum(queries)])
    num_tokens = int(starts[-1]) + 3  # padding
    tables = np.random.default_rng(0).permutation(len(chunks) * 8).reshape(len(chunks), 8)
    index = RaggedIndex(
        kv_slots=jnp.arange(num_tokens, dtype=jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        context_lens=jnp.asarray([first + count for first, count in chunks], jnp.int32),
        block_tables=jnp.asarray(tables, jnp.int32),
    )
    rows = num_chunk_rows(len(chunks), num_tokens, SIZE)
    positions = np.concatenate([*(np.arange(first, first + count) for first, count in chunks), np.zeros(3)])
    # A cache group with windows has freed whole blocks that no query sees.
    freed = np.array([max(first - SIZE + 1, 0) // BLOCK if windowed else 0 for first, _ in chunks])
    index = replace(
        index,
        context_lens=index.context_lens - jnp.asarray(freed * BLOCK, jnp.int32),
        block_tables=jnp.asarray([np.roll(row, -count) for row, count in zip(tables, freed, strict=True)], jnp.int32),
    )
    got = in_chunks(index, jnp.asarray(positions, jnp.int32), SIZE, block_size=BLOCK, num_rows=rows)
    expected = []
    for sequence, (first, count) in enumerate(chunks):
        for begin in range(first // SIZE * SIZE, first + count, SIZE) if count else ():
            context = min(first + count, begin + SIZE) - begin
            query = starts[sequence] + max(begin - first, 0)
            blocks = tables[sequence, begin // BLOCK : -(-(begin + context) // BLOCK)]
            expected.append((int(query), context, blocks.tolist()))
    assert len(expected) <= rows
    used = slice(0, len(expected))
    assert got.query_starts[used].tolist() == [query for query, _, _ in expected]
    assert set(got.query_starts[len(expected) :].tolist()) == {int(starts[-1])}
    assert got.context_lens.tolist() == [context for _, context, _ in expected] + [0] * (rows - len(expected))
    for row, (_, _, blocks) in enumerate(expected):
        assert got.block_tables[row, : len(blocks)].tolist() == blocks


def test_chunks_consist_of_whole_blocks():
    zeros = jnp.zeros(1, jnp.int32)
    index = RaggedIndex(
        kv_slots=zeros,
        query_starts=jnp.zeros(2, jnp.int32),
        context_lens=zeros,
        block_tables=jnp.zeros((1, 1), jnp.int32),
    )
    with pytest.raises(ValueError, match=r"block_size is 16, but this model attends within chunks of 24 tokens"):
        in_chunks(index, zeros, 24, block_size=16, num_rows=2)
