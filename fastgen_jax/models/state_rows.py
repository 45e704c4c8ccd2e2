"""Which sequences a step computes, for layers with a state; and the convolution over the last tokens of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.core import RaggedBatch

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class StateRows:
    """The chunks of a step: row s computes the positions [starts[s], stops[s]) of the sequence in slots[s].

    A row without tokens is padding. A state is never read for position 0, so a slot needs no reset for a new sequence.
    """

    slots: Int[Array, " S"]
    starts: Int[Array, " S"]
    stops: Int[Array, " S"]
    first_tokens: Int[Array, " S"]
    """Index in the batch of the token at `starts`."""
    of_tokens: Int[Array, " T"]
    """The row of each token."""
    positions: Int[Array, " T"]
    is_token: Bool[Array, " T"]
    """Whether a token is not padding."""

    def places(self, layer: Int[Array, ""] | int, num_places: int, num_layers: int) -> Int[Array, " S"]:
        """The rows of a flat pool of `num_places` rows that belong to the slots in a layer; out of range for padding.

        A slot that is out of range, as in a step that is only timed, is padding too.
        """
        num_slots = num_places // num_layers
        is_used = (self.stops > self.starts) & (self.slots < num_slots)
        return jnp.where(is_used, layer * num_slots + self.slots, num_places)


def state_rows(batch: RaggedBatch) -> StateRows:
    """The rows of a batch with `slots`; ValueError if it has none."""
    if batch.slots is None:
        raise ValueError("the batch has no slots, but the model keeps states in them; pack it with a Bucket with states")
    index, num_tokens = batch.index, batch.positions.shape[0]
    first, lengths = index.query_starts[:-1], jnp.diff(index.query_starts)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = jnp.searchsorted(index.query_starts, tokens, side="right").astype(jnp.int32) - 1
    return StateRows(
        slots=batch.slots,
        starts=index.context_lens - lengths,
        stops=index.context_lens,
        first_tokens=first,
        of_tokens=jnp.minimum(rows, first.shape[0] - 1),
        positions=batch.positions,
        is_token=tokens < index.query_starts[-1],
    )


def convolved(
    x: Float[Array, "T C"],
    kernel: Float[Array, "W C"],
    tails: Float[Array, "places _"],
    rows: StateRows,
    layer: Int[Array, ""] | int,
    num_layers: int,
) -> tuple[Float[Array, "T C"], Float[Array, "places _"]]:
    """sum_j kernel[W - 1 - j] x[position - j] in float32 for each token, and the tails with those of this step.

    The tail of a slot holds the last W - 1 inputs of its sequence one after another, that of position p in place
    p mod (W - 1). (Rows that fill no tile on a TPU would make its compiler copy the pool into another layout.)
    The terms are added in a fixed order, so the result does not depend on which of them come from the tail.
    """
    width = kernel.shape[0]
    if width == 1:
        return x.astype(jnp.float32) * kernel.astype(jnp.float32), tails
    x32, weights = x.astype(jnp.float32), kernel.astype(jnp.float32)
    num_places, num_back = tails.shape[0], width - 1
    places = rows.places(layer, num_places, num_layers)
    # The one place that reads the pool: if XLA put the gather into what uses it, it might copy the pool before the scatter.
    held = jax.lax.optimization_barrier(jnp.take(tails, places, axis=0, mode="clip"))
    held = held.reshape(-1, x.shape[1])  # [S * (W - 1), C]
    start = jnp.take(rows.starts, rows.of_tokens)  # [T]
    y = x32 * weights[-1][None, :]
    for back in range(1, width):
        position = rows.positions - back
        in_chunk = jnp.roll(x32, back, axis=0)  # used only where the token `back` places before belongs to the same chunk
        in_tail = jnp.take(held, rows.of_tokens * num_back + position % num_back, axis=0, mode="clip")
        before = jnp.where((position >= start)[:, None], in_chunk, in_tail)
        y = y + jnp.where((position >= 0)[:, None], before, 0.0) * weights[width - 1 - back][None, :]
    # The last position before `stops` that belongs in each place of the tail.
    last = rows.stops[:, None] - 1
    last = last - (last - jnp.arange(num_back, dtype=jnp.int32)[None, :]) % num_back  # [S, W - 1]
    is_new = last >= rows.starts[:, None]
    token = rows.first_tokens[:, None] + last - rows.starts[:, None]
    new = jnp.take(x32, token, axis=0, mode="clip")
    kept = jnp.where(is_new[..., None], new, held.reshape(new.shape)).reshape(-1, tails.shape[1])
    return y, tails.at[places].set(kept, mode="drop", unique_indices=True)
