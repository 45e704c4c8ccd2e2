"""Which kernel of a device multiplies weights of 4 bits, and what it needs of them. Does not import Pallas."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import gpu_target, tpu_target
from pallas_kernels.jax_versions import AMPERE_PRODUCT, HOPPER_PRODUCT, TPU_KERNELS, too_old
from pallas_kernels.matmul import ampere_support, hopper_support, tpu_support

Int4Kernel = Literal["hopper", "ampere", "tpu"]

_VERSIONS = {"hopper": HOPPER_PRODUCT, "ampere": AMPERE_PRODUCT, "tpu": TPU_KERNELS}


def int4_kernel(device: Any) -> Int4Kernel | None:
    """The kernel that reads an `Int4Weight` where it is on `device`, a jax.Device; None if there is none."""
    kernel: Int4Kernel | None = None
    if device.platform == "tpu":
        kernel = "tpu" if tpu_target.kind_of(device.device_kind) else None
    elif device.platform == "gpu":
        kernel = gpu_target.kernel_for(str(getattr(device, "compute_capability", "")))
    return kernel if kernel and not int4_needs(kernel) else None


def int4_needs(kernel: Int4Kernel) -> str | None:
    """What this jax lacks for a kernel, with the remedy, as the end of a sentence; None: nothing."""
    return too_old(_VERSIONS[kernel])


def int4_fits(kernel: Int4Kernel, shape: tuple[int, ...], *, size: int, dtype: DTypeLike) -> bool:
    """Whether the kernel multiplies activations of `dtype` with numbers [..., K, N] of which `size` inputs share a scale.

    `shape` is what a device has of the weight.
    """
    if kernel == "tpu":
        return tpu_support.fits_sizes(shape, size)
    support = hopper_support if kernel == "hopper" else ampere_support
    return support.fits(shape, hopper_support.INT4, jnp.dtype(dtype), size=size)
