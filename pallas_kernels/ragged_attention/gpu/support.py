"""Conditions for using the GPU kernels. Does not import Pallas, whose GPU part takes most of a second to import."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import gpu_target, jax_versions
from pallas_kernels.ragged_attention.arguments import Latents
from pallas_kernels.ragged_attention.quantized import Cache, QuantizedCache

CACHE_DTYPES = (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn)
QUANTIZED_BLOCK = 64  # minimum tokens per block of an 8-bit cache: the number of rows that are dequantized together
MAX_HEAD_DIM = 256  # of kernels whose warpgroups have all columns of a row
MAX_KEY_DIM, MAX_VALUE_DIM = 576, 512  # of those for wider heads: what fits into Hopper's shared memory and registers
MAX_GROUP = 120  # a tile has up to 128 rows, and begins at a multiple of 8
AMPERE_SHORT = 48  # Ampere's tiles have 64 rows for up to this many query heads per KV head, otherwise 128
# If D is above 128, the float32 results of 128 rows exceed Hopper's shared memory and Ampere's registers.
MAX_GROUP_WIDE = {"hopper": 64, "ampere": AMPERE_SHORT}


WIDE_ROWS = {"hopper": 64, "ampere": 32}  # of a tile if D exceeds MAX_HEAD_DIM
WIDE_AMPERE = ("8.0", "8.7", None)  # with shared memory of 163 KiB for a thread block; None: unknown
MAX_PARTS = 4  # of the query heads of a KV head, each of which reads all keys


def unsupported(
    k_cache: Cache, num_heads: int, generation: str, *, latents: Latents | None = None, interpreted: bool = False
) -> str | None:
    """Why the kernel of a generation does not support this jax or this cache, with the remedy; None if it does.

    The Pallas interpreter can run both kernels with every jax that can compile one of them.
    """
    reason = beyond_limits(k_cache, num_heads, generation, latents=latents)
    if reason := reason or jax_versions.too_old(jax_versions.GPU_KERNELS):
        return reason
    is_wide = k_cache.shape[-1] > MAX_HEAD_DIM
    if is_wide and not interpreted and (reason := jax_versions.too_old(jax_versions.WIDE_KERNEL)):
        return f"of heads wider than {MAX_HEAD_DIM} {reason}"
    if generation == "ampere" and not interpreted and (reason := jax_versions.too_old(jax_versions.AMPERE_KERNEL)):
        return f"of GPUs of compute capability 8 {reason}"
    return None


def beyond_limits(k_cache: Cache, num_heads: int, generation: str, *, latents: Latents | None = None) -> str | None:
    """Why the kernel of a generation does not support this cache, with the remedy; None if it does."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    if k_cache.dtype not in CACHE_DTYPES:
        names = "bfloat16, float16, int8 and float8_e4m3fn"
        return f"supports {names} caches but k_cache has dtype {k_cache.dtype}; store bfloat16"
    if head_dim % 16:
        return f"supports head dimensions that are multiples of 16 but D is {head_dim}; pad q, k, v and the cache with zeros"
    if block_size < 8 or block_size & (block_size - 1):
        return f"needs a block size that is a power of two of at least 8, but it is {block_size}"
    if isinstance(k_cache, QuantizedCache):
        return _quantized_unsupported(k_cache, num_heads // num_kv_heads, generation)
    is_wide = head_dim > MAX_HEAD_DIM
    if is_wide and (reason := _wide_unsupported(head_dim, num_heads // num_kv_heads, generation, latents)):
        return reason
    copied = head_dim if latents is None or not is_wide else latents.key_dim
    if generation == "ampere" and copied_bytes(block_size, copied, 2) is None:
        needed = next(rows for rows in (16, 32) if copied_bytes(rows, copied, 2))
        return f"needs a block size of at least {needed} where D is {head_dim}, but it is {block_size}"
    if is_wide:
        return None
    group = num_heads // num_kv_heads
    most = _most_wide(group, generation) if head_dim > 128 else MAX_GROUP
    if group > most:
        return f"supports up to {most} query heads per KV head where D is {head_dim} but there are {group}"
    return None


def _wide_unsupported(head_dim: int, group: int, generation: str, latents: Latents | None) -> str | None:
    capability = gpu_target.compute_capability()
    if generation == "ampere" and capability not in WIDE_AMPERE:
        return f"of GPUs of compute capability {capability} supports D up to {MAX_HEAD_DIM} but D is {head_dim}"
    if parts_of(group, generation) is None:
        return (
            f"supports up to {WIDE_ROWS[generation]} query heads per KV head where D is {head_dim}, or {MAX_PARTS} times "
            f"as many if they can be divided, but there are {group}"
        )
    if latents is None:
        if head_dim % 128 or head_dim > MAX_VALUE_DIM:
            return f"supports D up to {MAX_HEAD_DIM}, and multiples of 128 up to {MAX_VALUE_DIM}, but D is {head_dim}"
        return None
    key_dim, value_dim = latents.key_dim, latents.value_dim
    columns = next((width for width in (64, 32, 16) if key_dim % width == 0), None)  # adjacent in shared memory
    if columns is None or key_dim > MAX_KEY_DIM or value_dim % (2 * 64) or value_dim > min(key_dim, MAX_VALUE_DIM):
        return (
            f"supports latents with keys of a multiple of 16 up to {MAX_KEY_DIM} and values of a multiple of 128 up to "
            f"{MAX_VALUE_DIM} numbers but they have {key_dim} and {value_dim}"
        )
    return None


def parts_of(group: int, generation: str) -> int | None:
    """Into how many parts the query heads of a KV head are divided if D exceeds MAX_HEAD_DIM, so that a tile has room for
    each; None if they cannot be."""
    for parts in range(1, MAX_PARTS + 1):
        # A tile begins at a granule, up to 7 rows before its first head.
        heads = group // parts
        most = WIDE_ROWS[generation] - (0 if heads % 8 == 0 or 8 % (heads or 1) == 0 else 7)
        if group % parts == 0 and heads <= most:
            return parts
    return None


def _quantized_unsupported(k_cache: Cache, group: int, generation: str) -> str | None:
    _, _, block_size, head_dim = k_cache.shape
    most_heads = _most_wide(group, generation)  # the same limits as for D above 128
    if head_dim % 32 or head_dim > 128:
        return f"supports 8-bit caches if D is a multiple of 32 up to 128 but D is {head_dim}; store bfloat16"
    if block_size < QUANTIZED_BLOCK:
        return f"supports 8-bit caches in blocks of at least {QUANTIZED_BLOCK} tokens but they have {block_size}"
    if group > most_heads:
        return (
            f"supports up to {most_heads} query heads per KV head with an 8-bit cache but there are {group}; store bfloat16"
        )
    if generation == "ampere" and k_cache.dtype == jnp.float8_e4m3fn:
        return "of GPUs of compute capability 8 supports int8 caches but not float8_e4m3fn; store int8"
    return None


def _most_wide(group: int, generation: str) -> int:
    """The most query heads per KV head where D is above 128. A tile begins at a granule, up to 7 rows before its first."""
    most = MAX_GROUP_WIDE[generation]
    return most - 7 if generation == "hopper" and group % 8 and group <= most else most


def copied_bytes(rows: int, head_dim: int, itemsize: int) -> int | None:
    """On Ampere: the width in bytes of the widest tiles in which `rows` rows can be copied; None if there are none.

    A tile is 8 rows of this width. The four warps that copy together divide the tiles in a grid of 4 x 1, 2 x 2 or 1 x 4.
    """
    for width in (128, 64, 32):
        high, wide = rows // 8, itemsize * head_dim // width
        shared_out = wide % 4 == 0 if high % 2 else wide % 2 == 0 if high % 4 else True
        if itemsize * head_dim % width == 0 and shared_out:
            return width
    return None
