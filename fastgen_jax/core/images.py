"""The images among the tokens of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32


@pytree
class StepImages:
    """What a step with tokens of images has besides its `RaggedBatch`. Steps without them run another program."""

    is_image: Bool[Array, " T"]
    """Tokens whose embeddings are replaced."""
    embeddings: Float[Array, "T E"]
    """By what; the other rows mean nothing."""
    spans: Int32[Array, "P 4"]
    """Tokens that attend in both directions, as for `pallas_kernels.ragged_attention.with_spans`."""
