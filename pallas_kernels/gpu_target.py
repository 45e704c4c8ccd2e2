"""The GPU that a program is lowered for, which may be one that is not present."""

from __future__ import annotations

from typing import Literal

import jax

from pallas_kernels.jax_versions import platform_of


def platform() -> str:
    """What the program is lowered for: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return platform_of(device) or jax.default_backend()


def is_gpu() -> bool:
    """Whether the program is lowered for a GPU of any kind."""
    return platform() == "gpu"


def generation() -> Literal["hopper", "ampere"] | None:
    """The kernel for the GPU that the program is lowered for: "hopper" or "ampere" (which includes Ada Lovelace).

    The GPU is that of the abstract mesh, or this machine's if there is no such mesh. None without a GPU, and for GPUs
    without a kernel (T4, B200). To export a program from another machine, pass implementation="gpu".
    """
    return kernel_for(compute_capability() or "")


def kernel_for(capability: str) -> Literal["hopper", "ampere"] | None:
    """The kernel for GPUs of this compute capability; see `generation`."""
    if capability == "9.0":
        return "hopper"
    return "ampere" if capability.startswith("8.") else None


def compute_capability() -> str | None:
    """Compute capability of the GPU that the program is lowered for, such as "9.0"; None without a GPU or if unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        if platform_of(device) != "gpu":
            return None
        known = getattr(device, "compute_capability", None)  # if the device is a description without hardware
        if known is not None:
            return known
        if jax.default_backend() != "gpu" or jax.devices()[0].device_kind != device.device_kind:
            return None
    return getattr(jax.devices()[0], "compute_capability", None) if jax.default_backend() == "gpu" else None


def device_kind() -> str | None:
    """Name of the GPU that the program is lowered for, such as "NVIDIA A100-SXM4-80GB"; None without a GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if platform_of(device) == "gpu" else None
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def multiprocessors() -> int | None:
    """Number of multiprocessors of that GPU; None if unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores if platform_of(device) == "gpu" else None
    return getattr(jax.devices()[0], "core_count", None) if jax.default_backend() == "gpu" else None
