"""The machine that an engine runs on, or for which it is prepared elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from fastgen_jax.core.devices import multiplies_float8, multiplies_int8, supports_bfloat16
from fastgen_jax.engine.memory import Memory, memory_now
from pallas_kernels import native
from pallas_kernels.matmul import Int4Kernel, int4_kernel


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the settings of an engine depend on, besides the model and the options."""

    platform: str
    kind: str
    """Name of the device."""
    memory: Memory
    bfloat16: bool = True
    """Whether it computes in bfloat16."""
    float8: bool = False
    """Whether it multiplies 8-bit floats."""
    int8: bool = False
    """Whether it multiplies int8 by int8."""
    int4: Int4Kernel | None = None
    """The kernel that multiplies weights of 4 bits."""
    packs: bool = False
    """Whether matrices are packed for native CPU kernels."""
    num_devices: int = 1

    @staticmethod
    def here() -> Machine:
        """This machine, with the memory that is free now."""
        platform, device = jax.default_backend(), jax.local_devices()[0]
        return Machine(
            platform=platform,
            kind=device.device_kind,
            memory=memory_now(platform),
            bfloat16=supports_bfloat16(device),
            float8=multiplies_float8(device),
            int8=multiplies_int8(device),
            int4=int4_kernel(device),
            packs=platform == "cpu" and native.available(),
            num_devices=len(jax.local_devices()),
        )
