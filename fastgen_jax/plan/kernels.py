"""Which kernels devices have that are not here."""

from __future__ import annotations

from fastgen_jax.devices import FLOAT8_KINDS, INT4_KERNELS, Device
from pallas_kernels.jax_versions import HOPPER_PRODUCT, too_old
from pallas_kernels.matmul import Int4Kernel, int4_needs


def int4_kernel_of(device: Device) -> Int4Kernel | None:
    """The kernel for weights of 4 bits on such a device, with this jax."""
    kernel = INT4_KERNELS.get(device.kind)
    return kernel if kernel and not int4_needs(kernel) else None


def multiplies_float8(device: Device) -> bool:
    """Whether such a device multiplies 8-bit floats, with this jax."""
    return device.kind in FLOAT8_KINDS and (device.platform == "tpu" or not too_old(HOPPER_PRODUCT))
