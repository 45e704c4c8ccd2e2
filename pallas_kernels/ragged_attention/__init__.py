"""Causal attention of ragged chunks over a blocked KV cache, with the cache written on the way.

`ragged_attention` picks the implementation when the program is lowered for its platform. All of them are tested
against `reference.py`, which defines the semantics in forty lines.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention import contract
from pallas_kernels.ragged_attention.cpu import call as cpu
from pallas_kernels.ragged_attention.cpu.call import ragged_attention_cpu
from pallas_kernels.ragged_attention.derivative import with_derivative
from pallas_kernels.ragged_attention.gpu import support as gpu_support
from pallas_kernels.ragged_attention.quantized import QUANTIZED_DTYPES, Cache, QuantizedCache
from pallas_kernels.ragged_attention.reference import ragged_attention_reference
from pallas_kernels.ragged_attention.tpu import support as tpu_support
from pallas_kernels.ragged_attention.xla import ragged_attention_xla

__all__ = ["IMPLEMENTATIONS", "QUANTIZED_DTYPES", "QuantizedCache", "ragged_attention"]


def _ragged_attention_tpu(*arrays: Any, **options: Any) -> tuple[jax.Array, Cache, Cache]:
    """`tpu.call.ragged_attention_tpu`, imported when it is first asked for."""
    from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu

    return ragged_attention_tpu(*arrays, **options)


def _ragged_attention_gpu(*arrays: Any, **options: Any) -> tuple[jax.Array, Cache, Cache]:
    """`gpu.call.ragged_attention_gpu`, imported when it is first asked for."""
    from pallas_kernels.ragged_attention.gpu.call import ragged_attention_gpu

    return ragged_attention_gpu(*arrays, **options)


IMPLEMENTATIONS = {
    "reference": ragged_attention_reference,
    "xla": ragged_attention_xla,
    "cpu": ragged_attention_cpu,
    "tpu": _ragged_attention_tpu,
    "gpu": _ragged_attention_gpu,
}


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: Cache,
    v_cache: Cache,
    *,
    kv_slots: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    layer: int | jax.Array,
    num_blocks: int,
    scale: float,
    sliding_window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Cache, Cache]:
    """Attention of every token over its own sequence, and the two caches with this step's keys and values in them.

    Token `t` of chunk `s` (`query_starts[s] <= t < query_starts[s+1]`) stands at position
    `context_lens[s] - query_starts[s+1] + t` of its sequence and sees the keys up to there: those written by this very
    call and those that lie in the cache. Key `j` of sequence `s` lies in block `layer*N + block_tables[s, j // B]` at
    offset `j % B`. What the caches hold elsewhere may be anything, NaN included.

    Args:
      q: [T, H, D], H a multiple of K; query head h reads KV head h // (H // K).
      k, v: [T, K, D], converted to the dtype of the caches.
      k_cache, v_cache: [L*N, K, B, D], one flat pool, layer l owns blocks [l*N, (l+1)*N). Donate them to the jitted
        program: they are updated in place. A `QuantizedCache` keeps 8 bits a number and a scale a token and head.
      kv_slots: i32[T], where token t is written: block * B + offset, relative to the layer, every slot once. A slot
        outside [0, N*B) marks padding and is dropped.
      query_starts: i32[S+1], rising.
      context_lens: i32[S], cached and new tokens; 0 for an unused row, whose chunk is empty.
      block_tables: i32[S, M], relative to the layer; entries past the context, or wholly before the window of all
        queries, are never followed.
      layer: which layer's blocks, an int or a traced i32 scalar.
      num_blocks: N.
      scale: factor of the dot products.
      sliding_window: a query at position p sees keys j with p - sliding_window < j <= p. May be traced.
      soft_cap: scores become soft_cap * tanh(score / soft_cap).
      alibi_slopes: f32[H]; slope * (j - p) is added after the cap.
      sinks: f32[H]; one more logit a head that takes probability and carries no value.
      implementation: a key of `IMPLEMENTATIONS`; None picks the fastest for the platform that the program is lowered
        for: "cpu" on a CPU where a C++ compiler was found and the cache is float32 or bfloat16; "tpu" on a TPU where
        the cache fits it (float32, bfloat16 or 8 bits, D a multiple of 128, B a power of two of at least 8, 16 or 128);
        "gpu" on a GPU of compute capability 9.0, or 8 with a new enough jax (bfloat16, float16 or 8 bits, D a multiple of
        16 up to 256, B a power of two); else "xla", and on such a GPU the log says why.

    Returns:
      out [T, H, D] in the dtype of q, zero in rows that belong to no chunk; k_cache; v_cache. Softmax and sums are in
      float32. Every implementation has the derivative of "reference", computed as that computes, unless the cache has 8
      bits. With "cpu" a row's result is the same bits whatever its companions and however its prompt was chunked.

    Raises:
      ValueError: an argument's shape, dtype or static value does not fit, or the implementation cannot be had; a cache of
        8 bits is differentiated.
    """
    contract.check(
        q,
        k,
        v,
        k_cache,
        v_cache,
        kv_slots=kv_slots,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=block_tables,
        layer=layer,
        num_blocks=num_blocks,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r} but must be one of {names}, or None for the fastest")
    if implementation == "cpu":
        _require_cpu(k_cache)

    arrays = {
        "kv_slots": kv_slots,
        "query_starts": query_starts,
        "context_lens": context_lens,
        "block_tables": block_tables,
        "layer": jnp.asarray(layer, jnp.int32),
    }
    optional = {"sliding_window": sliding_window, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays |= {name: jnp.asarray(value) for name, value in optional.items() if value is not None}

    def run(name: str):
        def call(q, k, v, k_cache, v_cache, arrays):
            return IMPLEMENTATIONS[name](
                q, k, v, k_cache, v_cache, **arrays, num_blocks=num_blocks, scale=scale, soft_cap=soft_cap
            )

        return call

    operands = (q, k, v, k_cache, v_cache, arrays)
    of_reference = run("reference")
    if implementation is not None:
        return with_derivative(run(implementation), of_reference)(*operands)
    kernels = {}
    if k_cache.dtype in cpu.CACHE_DTYPES and cpu.available():
        kernels["cpu"] = run("cpu")
    if tpu_support.may_be_lowered() and tpu_support.unsupported(k_cache, block_tables.shape[1]) is None:
        kernels["tpu"] = run("tpu")
    if generation := gpu_support.generation():
        reason = gpu_support.unsupported(k_cache, q.shape[1], generation)
        if reason is None:
            kernels["cuda"] = run("gpu")
        else:
            gpu_support.say_once(reason)
    best = partial(jax.lax.platform_dependent, **kernels, default=run("xla"))
    return with_derivative(best, of_reference)(*operands)


def _require_cpu(k_cache: Cache) -> None:
    if k_cache.dtype not in cpu.CACHE_DTYPES:
        raise ValueError(
            f"implementation='cpu' takes float32 and bfloat16 caches but k_cache has dtype {k_cache.dtype}; "
            "use implementation='xla'"
        )
    if not cpu.available():
        raise ValueError(
            "implementation='cpu' needs a native kernel, which cannot be had here: install a C++ compiler (g++ or "
            "clang++), or use implementation='xla'; the log of pallas_kernels.native has the reason"
        )
