"""Attention within fixed chunks of a sequence (Llama 4): for the attention kernels, each chunk is a sequence of its own.

    chunks of 4 tokens      0 1 2 3 | 4 5 6 7 | 8 9          this step computes 3 to 8
    rows of the index       0 1 2 3: context 4, computes 3;  4 5 6 7: context 4, computes all;  8: context 1, computes 8

A chunk begins with a block, so its row of the block table is a part of that of the sequence. Kernels need no mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels.ragged_attention import RaggedIndex

if TYPE_CHECKING:
    from jaxtyping import Array, Int


def num_chunk_rows(num_sequences: int, num_tokens: int, size: int) -> int:
    """The most rows that `in_chunks` can need: each sequence has one more for every border that its tokens cross."""
    return num_sequences + min(num_sequences, num_tokens // 2) + num_tokens // size


def in_chunks(index: RaggedIndex, positions: Int[Array, " T"], size: int, *, block_size: int, num_rows: int) -> RaggedIndex:
    """`index` with one row for each chunk of `size` tokens that tokens of this step are in, in the order of the tokens.

    `positions` are those of the tokens in their sequences. The tables of a cache group with windows begin at a later block.

    Raises ValueError unless `size` is a multiple of `block_size`.
    """
    if size % block_size:
        raise ValueError(
            f"block_size is {block_size}, but this model attends within chunks of {size} tokens, which must be whole "
            f"blocks; choose a block_size that divides {size}"
        )
    queries, last = jnp.diff(index.query_starts), index.block_tables.shape[1] - 1
    starts = jnp.take(positions, index.query_starts[:-1], mode="clip")  # of the chunks of this step
    lengths = starts + queries
    tables_begin = lengths - index.context_lens
    firsts = starts // size
    counts = jnp.where(queries > 0, (lengths - 1) // size - firsts + 1, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    used = row < ends[-1]
    sequence = jnp.minimum(jnp.sum(ends[None, :] <= row[:, None], axis=1, dtype=jnp.int32), counts.shape[0] - 1)

    def of_row(values: Int[Array, " S"]) -> Int[Array, " rows"]:
        return jnp.take(values, sequence)

    begins = (of_row(firsts - ends + counts) + row) * size  # positions where the chunks begin
    query = of_row(index.query_starts[:-1]) + jnp.maximum(begins - of_row(starts), 0)
    used_tokens = index.query_starts[-1]
    blocks = (begins - of_row(tables_begin))[:, None] // block_size + jnp.arange(last + 1, dtype=jnp.int32)[None, :]
    return RaggedIndex(
        kv_slots=index.kv_slots,
        query_starts=jnp.append(jnp.where(used, query, used_tokens), used_tokens),
        context_lens=jnp.where(used, jnp.minimum(of_row(lengths) - begins, size), 0),
        block_tables=jnp.take_along_axis(jnp.take(index.block_tables, sequence, axis=0), jnp.clip(blocks, 0, last), axis=1),
    )
