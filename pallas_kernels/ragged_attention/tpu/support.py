"""Conditions for using the TPU kernel. Does not import Pallas, whose TPU part takes most of a second to import."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.jax_versions import TPU_KERNELS, platform_of, too_old
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache

LANES = 128
CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)
_NAMES = ", ".join(jnp.dtype(dtype).name for dtype in CACHE_DTYPES)
# SMEM holds only the block tables of the sequences being processed: 2 * J rows of M entries.
MAX_TABLE_WORDS = 96 * 1024


def unsupported(k_cache: Cache, max_blocks: int, *, interpreted: bool = False) -> str | None:
    """Why the kernel does not support this cache or this jax, with the remedy; None if it does.

    The Pallas interpreter can run it with any version of jax.
    """
    _, _, block_size, width = k_cache.shape
    # The scales of a block are laid out along the lanes.
    rows = LANES if isinstance(k_cache, QuantizedCache) else granule_rows(k_cache.dtype)
    if k_cache.dtype not in CACHE_DTYPES:
        return f"supports {_NAMES} caches but k_cache has dtype {k_cache.dtype}; store bfloat16"
    if width % LANES:
        return (
            f"supports rows of a multiple of {LANES} numbers but they are {width}; pad q, k, v and the cache with zeros, or "
            f"pack keys and values of up to {LANES // 2} into one cache"
        )
    if block_size < rows or block_size & (block_size - 1):
        return f"needs a block size that is a power of two of at least {rows}, but it is {block_size}"
    if 2 * max_blocks > MAX_TABLE_WORDS:
        return (
            f"supports up to {MAX_TABLE_WORDS // 2} blocks per sequence but block_tables has {max_blocks}; "
            f"choose a larger block size than {block_size}"
        )
    return None if interpreted else too_old(TPU_KERNELS)


def may_be_lowered() -> bool:
    """Whether the program being traced may be for a TPU, so that the kernel is worth a second of tracing.

    True if this machine has a TPU, or under an abstract mesh of TPUs. To export a program for TPUs from another machine,
    pass implementation="tpu".
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return platform_of(device) == "tpu" or jax.default_backend() == "tpu"


def granule_rows(dtype: DTypeLike) -> int:
    """Rows per memory tile. A block consists of a whole number of tiles."""
    return 32 // jnp.dtype(dtype).itemsize
