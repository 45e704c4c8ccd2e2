"""Which kernels devices have that are not here."""

from __future__ import annotations

from fastgen_jax.devices import INT4_KERNELS, Device
from pallas_kernels.matmul import Int4Kernel, int4_needs


def int4_kernel_of(device: Device) -> Int4Kernel | None:
    """The kernel for weights of 4 bits on such a device, with this jax."""
    kernel = INT4_KERNELS.get(device.kind)
    return kernel if kernel and not int4_needs(kernel) else None
