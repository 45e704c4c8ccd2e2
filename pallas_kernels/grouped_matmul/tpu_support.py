"""When the TPU kernel of `tpu.py` may be used; apart from it, so that only programs for TPUs load Pallas."""

from __future__ import annotations

import jax

from pallas_kernels.jax_versions import TPU_KERNELS, platform_of, too_old

LANES = 128
_LARGEST_DEPTH = 4096  # a tile of float32 weights with so many inputs has 2 MiB


def may_be_lowered() -> bool:
    """Whether the program being traced may be for a single TPU, and this jax is new enough for the kernel.

    XLA partitions its own kernel over the devices of a mesh, but not this one, which needs a shard_map there.
    """
    if too_old(TPU_KERNELS):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1 and not mesh.manual_axes:
        return False
    return platform_of(mesh.abstract_device) == "tpu" or jax.default_backend() == "tpu"


def supports(shape: tuple[int, ...]) -> bool:
    """Whether the kernel reads weights [G, E, F] where they are.

    Otherwise the compiler first copies all of them to another layout, if F is no multiple of the lanes, or E can neither be
    divided into tiles nor fits into one.
    """
    return shape[2] % LANES == 0 and (shape[1] % LANES == 0 or shape[1] <= _LARGEST_DEPTH)
