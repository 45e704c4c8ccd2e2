"""A TPU to lower programs for, without hardware."""

from __future__ import annotations

import contextlib
import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class AbstractTpu(jax.sharding.AbstractDevice):
    """JAX's own description has no platform before 0.10.1."""

    platform: str = "tpu"


def lowering_for_tpu(kind: str = "TPU v5 lite") -> contextlib.AbstractContextManager[object]:
    """Programs are traced for one TPU of this kind."""
    device = AbstractTpu(device_kind=kind, num_cores=1)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
