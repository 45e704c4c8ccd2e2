"""Ragged attention on the CPU, by the native kernel in `kernel.cc`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.ragged_attention.arguments import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.packed import is_packed
from pallas_kernels.ragged_attention.quantized import Cache

if TYPE_CHECKING:
    from jaxtyping import Array, Float

CACHE_DTYPES = (jnp.float32, jnp.bfloat16)

_TARGETS = {
    jnp.dtype(jnp.float32): "pallas_kernels_ragged_attention_f32",
    jnp.dtype(jnp.bfloat16): "pallas_kernels_ragged_attention_bf16",
}
_NO_WINDOW = np.iinfo(np.int32).max


def available() -> bool:
    """True when the kernel can be called; compiles it if necessary (seconds, once per machine)."""
    return native.load("ragged_attention", {target: target for target in _TARGETS.values()})


def ragged_attention_cpu(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
    """Same arguments and results as `pallas_kernels.ragged_attention.ragged_attention`; float32 and bfloat16 caches.

    Every bit of a row's result depends only on its query, its keys and its position: not on the other rows, on how the
    prompt was chunked, on the placement of the blocks, or on the number of threads. See `kernel.cc`.
    """
    assert not is_packed(v_cache, scoring), "they are refused before"
    values = jnp.zeros((0, 0, 0, 0), k_cache.dtype) if v_cache is None else v_cache  # [0]: they are read from the keys
    none = jnp.zeros((0,), jnp.float32)
    call = jax.ffi.ffi_call(
        _TARGETS[jnp.dtype(k_cache.dtype)],
        (
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        input_output_aliases={3: 1} if v_cache is None else {3: 1, 4: 2},  # the caches are updated in place
    )
    out, k_cache, values = call(
        q.astype(jnp.float32),
        k.astype(jnp.float32),
        v.astype(jnp.float32),
        k_cache,
        values,
        index.kv_slots,
        index.query_starts,
        index.context_lens,
        index.block_tables,
        jnp.asarray(layer.number, jnp.int32),
        jnp.asarray(_NO_WINDOW if scoring.sliding_window is None else scoring.sliding_window, jnp.int32),
        none if scoring.alibi_slopes is None else scoring.alibi_slopes,
        none if scoring.sinks is None else scoring.sinks,
        num_blocks=np.int64(layer.num_blocks),
        scale=np.float32(scoring.scale),
        soft_cap=np.float32(0.0 if scoring.soft_cap is None else scoring.soft_cap),
    )
    return out.astype(q.dtype), k_cache, None if v_cache is None else values
