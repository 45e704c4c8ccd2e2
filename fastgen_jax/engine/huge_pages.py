"""Large memory pages for the weights, which every step reads completely.

With pages of 4 KiB the prefetcher of a CPU stops every 4 KiB, and every page needs an address translation. Linux grants
2 MiB pages on request; on other systems, or if the kernel refuses, nothing changes. The KV cache would benefit too, but
moving gigabytes of it would delay startup by seconds (2.5 ms per page, measured).
"""

from __future__ import annotations

import ctypes
import sys

import jax

_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the second moves data out of small pages, from Linux 6.1 on


def use_huge_pages(arrays: object) -> int:
    """Requests 2 MiB pages for every array of a pytree in the host's memory; returns the bytes granted."""
    if sys.platform != "linux":
        return 0
    granted = 0
    for array in jax.tree_util.tree_leaves(arrays):
        if array.devices() != {jax.devices("cpu")[0]}:
            continue
        start = array.unsafe_buffer_pointer()
        first, end = -(-start // _PAGE) * _PAGE, (start + array.nbytes) // _PAGE * _PAGE
        if first < end:
            granted += _advise(first, end - first)
    return granted


def _advise(address: int, length: int) -> int:
    madvise = ctypes.CDLL(None).madvise
    region = ctypes.c_void_p(address), ctypes.c_size_t(length)
    if madvise(*region, _MADV_HUGEPAGE) != 0:
        return 0
    return length if madvise(*region, _MADV_COLLAPSE) == 0 else 0
