"""What some models carry along beside the residual stream, or instead of a single one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """An embedding of each token for each layer, added to the residual stream at the end of the layer. Source: Gemma 3n."""

    dim: int  # numbers of a token for one layer
    vocab_size: int  # tokens with an embedding of their own; the others share that of token 0
    num_rows: int  # rows of the table: the tokens, and on several devices padding


@dataclass(frozen=True, kw_only=True)
class AltUp:
    """Several residual streams, of which a layer computes one and predicts the others. Source: arXiv:2301.13310."""

    num_streams: int
    active: int = 0  # the stream that layers compute
    scaled: bool = True  # the active stream is multiplied by its learned scale before it meets the inputs of the layer

    def __post_init__(self) -> None:
        if self.num_streams < 2 or not 0 <= self.active < self.num_streams:
            raise ValueError(
                f"num_streams is {self.num_streams} and active is {self.active}; there must be at least 2 streams, one of "
                "which is the active one"
            )
