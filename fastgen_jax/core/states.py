"""What a sequence holds beside its KV blocks: states of fixed size, in the slot that it has while it runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class StateShapes(NamedTuple):
    """The states of one sequence, by name, in each of `num_layers` layers. All of them are float32."""

    num_layers: int
    of_layer: dict[str, tuple[int, ...]]

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence, over all layers."""
        return self.num_layers * sum(4 * math.prod(shape) for shape in self.of_layer.values())

    def zeros(self, num_slots: int) -> dict[str, Float[Array, "_ ..."]]:
        """The states of `num_slots` sequences as flat pools: layer l owns the rows [l * num_slots, (l + 1) * num_slots).

        As for `KVCache`, this is the form that no compiler copies. No row is read before the first token of its sequence
        is computed, which does not depend on it.
        """
        return {name: jnp.zeros((self.num_layers * num_slots, *shape), jnp.float32) for name, shape in self.of_layer.items()}


NO_STATES = StateShapes(0, {})
