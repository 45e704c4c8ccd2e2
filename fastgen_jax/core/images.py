"""The images among the tokens of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32


@pytree
class StepImages:
    """What a step with tokens of images has besides its `RaggedBatch`.

    Steps without them run another program or, in an engine that is deterministic, have only zeros here.
    """

    is_image: Bool[Array, " T"]
    """Tokens whose embeddings are replaced."""
    embeddings: Float[Array, "parts T E"]
    """`embeddings[0]` is what replaces them; `embeddings[i]` is added to the residual stream after layer i - 1. All are 0 at
    the other tokens."""
    spans: Int32[Array, "P 4"] | None
    """Tokens that attend in both directions, as for `pallas_kernels.ragged_attention.with_spans`; None: no image's do."""
