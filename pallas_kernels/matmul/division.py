"""How a weight is divided over the devices of a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jax.sharding import Mesh

from pallas_kernels.pytree import pytree, static

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Division(NamedTuple):
    """Each device has a share of the inputs of a weight, or of its outputs, or all of it."""

    mesh: Mesh
    axis: str | None
    """None: every device has all of the weight, and computes the whole product."""
    of_inputs: bool
    in_order: bool = False
    """Whether sums over devices are `ordered_sum`; only of inputs."""

    def share(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of a weight [..., K, N] that a device has."""
        *layers, inputs, outputs = shape
        if self.axis is None:
            return shape
        count = self.mesh.size
        return (*layers, inputs // count, outputs) if self.of_inputs else (*layers, inputs, outputs // count)


@pytree
class DividedArray:
    """A plain weight [K, N] whose sums over devices `linear` adds up by itself, because `division` is in order."""

    values: Float[Array, "K N"]
    division: Division = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N)"""
        return self.values.shape
