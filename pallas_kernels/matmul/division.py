"""How a weight is divided over the devices of a mesh."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh


class Division(NamedTuple):
    """Each device has a share of the inputs of a weight, or of its outputs, or all of it."""

    mesh: Mesh
    axis: str | None
    """None: every device has all of the weight, and computes the whole product."""
    of_inputs: bool

    def share(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of a weight [..., K, N] that a device has."""
        *layers, inputs, outputs = shape
        if self.axis is None:
            return shape
        count = self.mesh.size
        return (*layers, inputs // count, outputs) if self.of_inputs else (*layers, inputs, outputs // count)
