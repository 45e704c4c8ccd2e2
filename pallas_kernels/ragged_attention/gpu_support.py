"""Where the GPU kernel can be used. Imports nothing of Pallas, whose GPU part takes most of a second to import."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention.quantized import Cache

CACHE_DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 256
MAX_GROUP = 120  # a tile of two warpgroups has 128 rows, and begins at a multiple of 8
# Compute capability 9.0. Newer ones have other matrix instructions, older ones neither these nor TMA.
HOPPER_KINDS = ("H100", "H200", "H800", "H20", "GH200")


def unsupported(k_cache: Cache, num_heads: int) -> str | None:
    """Why the kernel cannot take this cache, with the remedy; None if it can."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    if k_cache.dtype not in CACHE_DTYPES:
        return f"takes bfloat16 and float16 caches but k_cache has dtype {k_cache.dtype}; store bfloat16"
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return (
            f"takes heads of multiples of 16 numbers up to {MAX_HEAD_DIM} but D is {head_dim}; "
            "pad q, k, v and the cache with zeros"
        )
    if block_size < 8 or block_size & (block_size - 1):
        return f"needs a block size that is a power of two of at least 8, but it is {block_size}"
    if num_heads // num_kv_heads > MAX_GROUP:
        return f"takes up to {MAX_GROUP} query heads a KV head but there are {num_heads // num_kv_heads}"
    return None


def may_be_lowered() -> bool:
    """Whether the program at hand may be one for a Hopper GPU: this machine's, or that of the abstract mesh.

    A program that is exported from elsewhere asks for implementation="gpu".
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform == "gpu" and is_hopper(device.device_kind)
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def is_hopper(device_kind: str) -> bool:
    """Whether a device called "NVIDIA H100 80GB HBM3" and the like has compute capability 9.0."""
    return any(word in HOPPER_KINDS for word in device_kind.split())
