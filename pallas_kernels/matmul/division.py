"""How a weight is divided over the devices of a mesh."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh


class Division(NamedTuple):
    """Each device has a share of the inputs of a weight, or of its outputs."""

    mesh: Mesh
    axis: str
    of_inputs: bool
