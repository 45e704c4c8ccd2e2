"""The tokens of one step."""

from __future__ import annotations

import jax

from fastgen_jax.core.pytree import pytree


@pytree
class RaggedBatch:
    """Chunks of up to S sequences, laid one after another in T tokens.

        token_ids      [ a5 a6 a7 | b0 b1 b2 b3 | c9 | 0 0 ]        T = 10
        positions      [  5  6  7 |  0  1  2  3 |  9 | 0 0 ]
        query_starts   [ 0          3             7    8   8 ]      S = 4: three chunks and an unused row
        context_lens   [ 8          4            10    0     ]

    The padding rule, here and nowhere else: an unused row has an empty query and context length 0; a padding token
    has an out-of-range KV slot, so that nothing is written for it, and belongs to no chunk, so that nobody reads its
    result; an unused sampled row repeats row 0 and is ignored by the sampler.
    """

    token_ids: jax.Array
    """i32[T]: input tokens. Ignored where `token_slots` names a sequence."""
    token_slots: jax.Array
    """i32[T]: sequence whose last sampled token, still on the device, is the input; out of range: `token_ids` is."""
    positions: jax.Array
    """i32[T]: position of each token in its own sequence."""
    rope_lengths: jax.Array
    """i32[T]: length of sequence that a length-dependent rotary scaling assumes for the token (others ignore it)."""
    kv_slots: jax.Array
    """i32[T]: where the token's K and V go, `block_id * B + offset`; `num_blocks * B` for padding."""
    query_starts: jax.Array
    """i32[S + 1]: chunk i is `token_ids[query_starts[i]:query_starts[i + 1]]`."""
    context_lens: jax.Array
    """i32[S]: tokens attended to, cached and new; 0 for an unused row."""
    block_tables: jax.Array
    """i32[S, M]: blocks of each sequence; entries past the context are never read."""
    sample_rows: jax.Array
    """i32[R]: rows of [0, T) whose logits are wanted."""
    num_sample_rows: jax.Array
    """i32[]: how many of `sample_rows` are used; the first ones."""
