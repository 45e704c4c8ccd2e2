"""The third version of ragged paged attention in vLLM's tpu-inference, for comparison in `tests.gate.schedule`.

This file contains none of its code. The kernel is imported from the PyPI package if that is installed; only the kernel's
module is needed, because the rest requires vLLM and a TPU:

    pip download --no-deps tpu-inference && python -m zipfile -e tpu_inference-*.whl DIR    (then DIR in PYTHONPATH)
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from tests.gate.calls import Call

SCHEDULES = {"DECODE": "RPAd-", "MIXED": "RPAm-"}  # prefixes of the names of its two kernels
VERSIONS = {"v5e": 5, "v5p": 5, "v6e": 6, "tpu7x": 7}  # the kernel's generation numbers; it has no tiles for v4


def is_here() -> bool:
    """Whether the package can be found."""
    return importlib.util.find_spec("tpu_inference") is not None


def load(kind: str) -> Any:
    """The kernel's module, patched to use the target device instead of the process's own."""
    if kind not in VERSIONS:
        raise NotImplementedError(f"tpu-inference has no tiles for {kind}, only for {', '.join(VERSIONS)}")
    found = importlib.util.find_spec("tpu_inference")
    assert found is not None, "call this only if `is_here`"
    # Skips the package's `__init__`, which imports vLLM.
    package = types.ModuleType("tpu_inference")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["tpu_inference"] = package
    kernel = importlib.import_module("tpu_inference.kernels.ragged_paged_attention.v3.kernel")
    kernel.get_tpu_version = lambda: VERSIONS[kind]  # pyright: ignore[reportAttributeAccessIssue]
    return kernel


def lower(call: Call, kind: str, array: Callable[..., Any], *, num_blocks: int, max_blocks: int) -> tuple[Any, Any]:
    """The lowered program of a bfloat16 call, and its tiles: {"DECODE": {"bq_sz": ...}, "MIXED": ...}."""
    import jax.numpy as jnp

    kernel = load(kind)
    bf16 = jnp.bfloat16
    sizes = {
        case.name: kernel.get_default_block_sizes(
            bf16,
            bf16,
            call.num_heads,
            call.num_kv_heads,
            call.head_dim,
            call.block_size,
            call.num_tokens,
            call.num_sequences,
            max_blocks,
            case=case,
        )
        for case in (kernel.RpaCase.DECODE, kernel.RpaCase.MIXED)
    }
    new = array(call.num_tokens, call.num_kv_heads, call.head_dim, dtype=bf16)
    cache = kernel.get_kv_cache_shape(num_blocks, call.block_size, call.num_kv_heads, call.head_dim, bf16)
    lowered = kernel.ragged_paged_attention.lower(
        array(call.num_tokens, call.num_heads, call.head_dim, dtype=bf16),
        new,
        new,
        array(*cache, dtype=bf16),
        array(call.num_sequences),
        array(call.num_sequences * max_blocks),
        array(call.num_sequences + 1),
        array(3),
        sm_scale=0.1,
    )
    return lowered, sizes


def count(
    chunks: Sequence[tuple[int, int]], schedules: dict[str, Any], sizes: dict[str, dict[str, int]], call: Call
) -> dict[str, float]:
    """Bundles and bytes of KV for `chunks` of (query length, context), according to the schedules that they use.

    Each schedule is a loop over sequences > (over pieces of queries, if there can be several >) over fetched keys > over
    the keys that are computed together; copies are unrolled.
    """
    row_bytes = 2 * call.num_kv_heads * call.head_dim * 2
    bundles, fetched = 0.0, 0
    for name, root in schedules.items():
        *outer, keys_loop, attention = _path_to_largest(root)
        rows, fetch, step = (sizes[name][size] for size in ("bq_sz", "bkv_sz", "bkv_csz"))
        bundles += root.own
        for length, context in chunks:
            if (length == 1) != (name == "DECODE"):
                continue
            bundles += outer[1].own
            for first in range(0, length, rows):
                end = min(context, context - length + first + rows)
                fetches = math.ceil(end / fetch)
                bundles += sum(loop.own for loop in outer[2:]) + fetches * keys_loop.own
                bundles += attention.once * sum(math.ceil(min(fetch, end - at) / step) for at in range(0, end, fetch))
                fetched += min(context, fetches * fetch) * row_bytes
    return {"bundles": bundles, "bytes": fetched}


def _path_to_largest(root: Any) -> list[Any]:
    """The loops from the root to the largest innermost loop, which multiplies."""

    def paths(loop: Any) -> list[list[Any]]:
        return [[loop, *rest] for inside in loop.inside for rest in paths(inside)] or [[loop]]

    return max(paths(root), key=lambda path: path[-1].once)
