"""The tokens of one step."""

from __future__ import annotations

import jax

from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention import RaggedIndex


@pytree
class RaggedBatch:
    """Chunks of up to S sequences, laid one after another in T tokens.

        token_ids      [ a5 a6 a7 | b0 b1 b2 b3 | c9 | 0 0 ]        T = 10, S = 4: see `RaggedIndex`
        positions      [  5  6  7 |  0  1  2  3 |  9 | 0 0 ]

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
    index: RaggedIndex
    """Which tokens belong to which sequence, and where their K and V are; the slot of padding is `num_blocks * B`."""
    sample_rows: jax.Array
    """i32[R]: rows of [0, T) whose logits are wanted."""
    num_sample_rows: jax.Array
    """i32[]: how many of `sample_rows` are used; the first ones."""
