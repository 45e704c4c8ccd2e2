"""What differs between the versions of JAX that are supported, each with the version that changed it.

Nothing else in the packages asks for the version of JAX.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import AbstractDevice

GPU_KERNELS = (0, 10, 2)
"""From here on, `plgpu.kernel` takes the types of results as `out_type`, and the kernels have been compiled and tested."""

TPU_KERNELS = (0, 10, 2)
"""The compilers that belong to older ones (tried: libtpu 0.0.21.1, which Colab has) do not accept the kernels.

Theirs cannot swap the axes of tiles with fewer than 8 heads. jax 0.7.2 also takes 0.0.21.1 for a newer version, by the
date of its build, and writes kernels in a format that it cannot read.
"""

COMPILE_WITHOUT_DEVICE = (0, 10, 2)
"""Tried: 0.7.2 ends in a segmentation fault when it asks a client without devices for its default layouts."""

AMPERE_KERNEL = (0, 12)
"""The kernel for Ampere needs mma and cp.async (0.10), and stores from any layout of registers (0.11)."""

MERGE_KERNEL = (0, 12)
"""As the kernel for Ampere, the one that merges the results of attention stores from registers to memory."""

WIDE_KERNEL = (0, 12)
"""The same for the attention kernel for heads wider than 256."""

WRITE_KERNEL = (0, 12)
"""The kernel that rotates and writes keys has been compiled and tested from here on."""

AMPERE_PRODUCT = (0, 12)
"""The same for the one for Ampere."""

HOPPER_PRODUCT = (0, 12)
"""The product with weights in place has been compiled and tested from here on."""

COMMAND_BUFFERS = (0, 12)
"""From here on, a whole step has been seen to become one CUDA graph: products that read slices, loops and branches too."""

AUTOTUNING_KEPT = (0, 12)
"""From here on, the folder of XLA's autotuning results is not part of the keys of JAX's compilation cache."""


def too_old(version: tuple[int, ...]) -> str | None:
    """What is missing if this jax is older than `version`, with the remedy, as the end of a sentence; otherwise None."""
    if jax.__version_info__ >= version:
        return None
    return f"needs jax {'.'.join(map(str, version))} or newer but this is {jax.__version__}; install that"


@dataclasses.dataclass(frozen=True)
class AbstractGpu(AbstractDevice):
    """A GPU of an abstract mesh. JAX's own description has no compute capability, and no platform before 0.10.1."""

    platform: str = "gpu"
    compute_capability: str | None = None


def platform_of(device: AbstractDevice | None) -> str | None:
    """The platform of a device of an abstract mesh, such as "tpu" or "gpu"; None without a device.

    Before 0.10.1, JAX describes a device by its kind alone, which for GPUs is the name of the product.
    """
    if device is None:
        return None
    kind = device.device_kind
    return getattr(device, "platform", None) or ("tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu")
