"""The tokens of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention import RaggedIndex

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@pytree
class RaggedBatch:
    """Chunks of up to S sequences, one after another in T tokens.

        token_ids      [ a5 a6 a7 | b0 b1 b2 b3 | c9 | 0 0 ]        T = 10, S = 4: see `RaggedIndex`
        positions      [  5  6  7 |  0  1  2  3 |  9 | 0 0 ]

    Padding: an unused row has an empty query and context length 0; a padding token has an out-of-range KV slot, so that
    nothing is written for it, and belongs to no chunk, so that its result is never read; an unused sampled row repeats
    row 0 and is ignored by the sampler.
    """

    token_ids: Int32[Array, " T"]
    """Input tokens. Ignored where `token_slots` names a sequence."""
    token_slots: Int32[Array, " T"]
    """Sequence whose last sampled token, still on the device, is the input; out of range: `token_ids` is."""
    positions: Int32[Array, " T"]
    """Position of each token in its own sequence."""
    rope_lengths: Int32[Array, " T"]
    """Sequence length that a length-dependent rotary scaling assumes for the token; other scalings ignore it."""
    index: RaggedIndex
    """Which tokens belong to which sequence, and where their K and V are; the slot of padding is `num_blocks * B`."""
    windowed: tuple[RaggedIndex, ...] = ()
    """The same for the second and later cache groups, whose sequences begin with a block that is before the window of all
    their tokens; (): `index` is that of all layers. `context_lens` are correspondingly shorter."""
    sample_rows: Int32[Array, " R"]
    """Rows of [0, T) whose logits are wanted."""
    num_sample_rows: Int32[Array, ""]
    """How many of `sample_rows` are used, counted from the first."""
    adapters: Int32[Array, " T"] | None = None
    """Number of each token's adapter, ascending; that of the first without one is the number of adapters. None: there are
    none."""
    rope_positions: Int32[Array, "3 T"] | None = None
    """Position of each token in the three streams of a rotary embedding with `sections`: time, row and column. None: all of
    them are `positions`."""
    slots: Int32[Array, " S"] | None = None
    """The slot of each sequence, for models that keep states in them; None for the others."""
