"""Large memory pages for the weights, which every step reads from end to end.

With pages of 4 KiB the prefetcher of a CPU stops every 4 KiB, and every page is an address to look up. Linux gives 2 MiB
pages to those who ask; elsewhere, and where it refuses, nothing happens. The KV cache would gain as well, but moving
gigabytes of it takes seconds (2.5 ms a page were measured), which a start cannot spare.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import jax

_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the second moves what lies in small pages, from Linux 6.1 on


def use_huge_pages(arrays: Any) -> int:
    """Asks for 2 MiB pages under every array of a pytree that lies in this machine's memory; returns the bytes granted."""
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
