"""Causal attention of ragged chunks over a blocked KV cache, including the cache update.

`ragged_attention` picks the implementation when the program is lowered for its platform. All of them are tested
against `reference.py`, which defines the semantics in forty lines.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_target, jax_versions
from pallas_kernels.ragged_attention import contract
from pallas_kernels.ragged_attention.arguments import Attention, CacheLayer, Latents, Plans, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.cpu import call as cpu
from pallas_kernels.ragged_attention.cpu.call import ragged_attention_cpu
from pallas_kernels.ragged_attention.derivative import with_derivative
from pallas_kernels.ragged_attention.gpu import support as gpu_support
from pallas_kernels.ragged_attention.packed import is_packed
from pallas_kernels.ragged_attention.quantized import QUANTIZED_DTYPES, Cache, QuantizedCache
from pallas_kernels.ragged_attention.reference import ragged_attention_reference
from pallas_kernels.ragged_attention.rotation import rotating
from pallas_kernels.ragged_attention.spans import SPAN_QUERIES, with_spans
from pallas_kernels.ragged_attention.tpu import support as tpu_support
from pallas_kernels.ragged_attention.xla import ragged_attention_xla

if TYPE_CHECKING:
    from jaxtyping import Array, Float

__all__ = [
    "IMPLEMENTATIONS",
    "QUANTIZED_DTYPES",
    "SPAN_QUERIES",
    "Attention",
    "CacheLayer",
    "Latents",
    "QuantizedCache",
    "RaggedIndex",
    "Scoring",
    "plan_layers",
    "ragged_attention",
    "rotates_while_writing",
    "with_spans",
]


_log = logging.getLogger(__name__)


def _ragged_attention_tpu(*arguments: Any) -> tuple[jax.Array, Cache, Cache | None]:
    """`ragged_attention_tpu`, imported on first use: it loads Pallas."""
    from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu

    return ragged_attention_tpu(*arguments)


def _ragged_attention_gpu(*arguments: Any) -> tuple[jax.Array, Cache, Cache | None]:
    """`ragged_attention_gpu`, imported on first use: it loads Pallas."""
    from pallas_kernels.ragged_attention.gpu.call import ragged_attention_gpu

    return ragged_attention_gpu(*arguments)


IMPLEMENTATIONS: dict[str, Attention] = {
    "reference": ragged_attention_reference,
    "xla": rotating(ragged_attention_xla),
    "cpu": rotating(ragged_attention_cpu),
    "tpu": rotating(_ragged_attention_tpu),
    "gpu": _ragged_attention_gpu,
}


def ragged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
    """Attention of every token over its own sequence, and the two caches with this step's keys and values written.

    Token t of chunk s (`query_starts[s] <= t < query_starts[s+1]`) is at position
    `context_lens[s] - query_starts[s+1] + t` of its sequence and attends to the keys up to and including that position:
    those written by this call and those already in the cache. Key j of sequence s is in block
    `layer*N + block_tables[s, j // B]` at offset `j % B`. The rest of the caches may hold anything, including NaN.

    Args:
      q: [T, H, D], H a multiple of K; query head h reads KV head h // (H // K).
      k, v: [T, K, D], converted to the dtype of the caches.
      k_cache, v_cache: [L*N, K, B, D], one flat pool; layer l owns blocks [l*N, (l+1)*N). Donate them to the jitted
        program: they are updated in place. A `QuantizedCache` keeps 8 bits per number, and one scale per token and head.
        If v_cache is None, k_cache is [L*N, K, B, 2D] and holds both (see `packed`); with `Scoring.latents` it is
        [L*N, K, B, D], values are read from it, and v is not used.
      index: which tokens belong to which sequence, and where their keys and values are.
      layer: the layer whose blocks are written and read.
      scoring: scale, window, cap, slopes and sinks, and the rotation of q and k if they are not rotated yet.
      implementation: a key of `IMPLEMENTATIONS`. None chooses the fastest for the platform that the program is lowered
        for: "cpu" on a CPU if a C++ compiler was found and the cache is float32 or bfloat16; "tpu" on a TPU if the kernel
        supports the cache (float32, bfloat16 or 8 bits, rows of a multiple of 128, B a power of two of at least 8, 16 or
        128);
        "gpu" on a GPU of compute capability 9.0 or 8.x (bfloat16, float16 or 8 bits, D a multiple of 16 up to 256, B a
        power of two; on 9.0 and 8.0 also some larger D, see `gpu.support`); both with a new enough jax; otherwise "xla". If
        "xla" is chosen on such a device, the log says why.

    Returns:
      out [T, H, D] in the dtype of q, zero in rows that belong to no chunk; k_cache; v_cache. Softmax and sums are in
      float32. Every implementation has the derivative of "reference", and computes it the same way, unless the cache has
      8 bits. With "cpu", the bits of a row's result do not depend on the other rows or on how its prompt was chunked.

    Raises:
      ValueError: the shape, dtype or static value of an argument is invalid, the implementation is not available, or an
        8-bit cache is differentiated.
    """
    contract.check(q, k, v, k_cache, v_cache, index, layer, scoring)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r} but must be one of {names}, or None for the fastest")
    packed = is_packed(v_cache, scoring)
    if implementation in ("cpu", "gpu") and packed:
        raise ValueError(
            f"implementation={implementation!r} needs keys and values in two caches but v_cache is None; pass a v_cache, or "
            "use implementation='xla'"
        )
    if implementation == "cpu":
        _require_cpu(k_cache)

    layer = dataclasses.replace(layer, number=jnp.asarray(layer.number, jnp.int32))
    scoring = jax.tree.map(jnp.asarray, scoring)
    operands = (q, k, v, k_cache, v_cache, index, layer, scoring)
    if implementation is not None:
        return with_derivative(IMPLEMENTATIONS[implementation])(*operands)
    kernels: dict[str, Attention] = {}
    if not packed and k_cache.dtype in cpu.CACHE_DTYPES and cpu.available():
        kernels["cpu"] = IMPLEMENTATIONS["cpu"]
    if _runs_on_tpu(k_cache, index):
        kernels["tpu"] = IMPLEMENTATIONS["tpu"]
    if not packed and _runs_on_gpu(k_cache, q.shape[1], scoring.latents):
        kernels["cuda"] = _ragged_attention_gpu
    best = partial(jax.lax.platform_dependent, **kernels, default=IMPLEMENTATIONS["xla"])
    return with_derivative(best)(*operands)


def plan_layers(
    indices: Sequence[RaggedIndex],
    k_cache: Cache,
    windows: Sequence[int | None],
    *,
    num_tokens: int,
    num_heads: int,
    num_blocks: int,
    packed: bool = False,
    latents: Latents | None = None,
    implementation: str | None = None,
    independent_pieces: bool = False,
) -> list[RaggedIndex]:
    """`indices` with what a kernel derives from them, so that a loop over layers does not derive it in every layer.

    Args:
      indices: as for `ragged_attention`, one for each kind of layer. They differ at most in where the keys are: in
        `kv_slots`, `context_lens` and `block_tables`.
      k_cache: an array or a `jax.ShapeDtypeStruct` like the cache of later calls; H and K are those of one device.
      windows: the sliding window of each kind of layer.
      num_tokens, num_heads, num_blocks: T, H and N of later calls.
      packed: whether the cache of later calls holds keys and values in one row.
      latents: `Scoring.latents` of later calls.
      implementation: as for `ragged_attention`.
      independent_pieces: whether a GPU's kernel divides a long context by its own length alone. Else the number of pieces,
        and with it the rounding, depends on the other sequences, so that there are always about enough for the device.

    Returns:
      one index for each of `indices`. Where kernels derive nothing, as on a CPU, they are those themselves.
    """
    plan_tpu = plan_gpu = None
    index = indices[0]
    if implementation == "tpu" or (implementation is None and _runs_on_tpu(k_cache, index)):
        from pallas_kernels.ragged_attention.tpu.call import plan_tpu
    if implementation == "gpu" or (implementation is None and not packed and _runs_on_gpu(k_cache, num_heads, latents)):
        from pallas_kernels.ragged_attention.gpu.call import plan_gpu, stack_plans
    if plan_tpu is None and plan_gpu is None:
        return list(indices)
    shape: dict[str, Any] = {"num_tokens": num_tokens, "num_heads": num_heads, "num_blocks": num_blocks}
    same = all(other is index for other in indices)
    tpu = [None] if plan_tpu is None else [plan_tpu(k_cache, index, packed=packed, **shape)]
    if plan_tpu is not None and not same:
        tpu += [plan_tpu(k_cache, other, tpu[0], packed=packed, **shape) for other in indices[1:]]
    gpu = [
        None if plan_gpu is None else plan_gpu(k_cache, i, window, independent=independent_pieces, latents=latents, **shape)
        for i, window in zip(indices, windows, strict=True)
    ]
    # Without the barrier XLA moves parts of a plan into every layer.
    tpu, gpu = jax.lax.optimization_barrier((tpu, gpu))
    tpu = tpu * len(indices) if len(tpu) == 1 else tpu
    if plan_gpu is not None:
        gpu = stack_plans(gpu, indices)
    return [
        dataclasses.replace(i, plans=Plans(tpu=of_tpu, gpu=of_gpu))
        for i, of_tpu, of_gpu in zip(indices, tpu, gpu, strict=True)
    ]


def rotates_while_writing(
    k_cache: Cache, num_heads: int, *, packed: bool = False, implementation: str | None = None
) -> bool:
    """Whether `Scoring.rotation` saves time, for such a cache: on GPUs with a kernel that also rotates.

    Elsewhere a rotation in front of the call is at least as fast. Arguments as for `plan_layers`.
    """
    if implementation not in (None, "gpu") or packed:
        return False
    if jnp.dtype(k_cache.dtype).itemsize != 2 or jax_versions.too_old(jax_versions.WRITE_KERNEL) is not None:
        return False
    return _runs_on_gpu(k_cache, num_heads)


def _runs_on_tpu(k_cache: Cache, index: RaggedIndex) -> bool:
    """Whether the program may be lowered for a TPU, and its kernel supports the cache; the log says why not."""
    if not tpu_support.may_be_lowered():
        return False
    reason = tpu_support.unsupported(k_cache, index.block_tables.shape[1])
    if reason is not None:
        _warn_once("TPU", reason)
    return reason is None


def _runs_on_gpu(k_cache: Cache, num_heads: int, latents: Latents | None = None) -> bool:
    """Whether the program may be lowered for a GPU, and its kernel supports the cache; the log says why not."""
    generation = gpu_target.generation()
    if generation is None:
        return False
    reason = gpu_support.unsupported(k_cache, num_heads, generation, latents=latents)
    if reason is not None:
        _warn_once("GPU", reason)
    return reason is None


@functools.cache
def _warn_once(platform: str, reason: str) -> None:
    """Logs why plain XLA runs on a device that has a kernel."""
    _log.warning("ragged attention runs in plain XLA: the %s kernel %s", platform, reason)


def _require_cpu(k_cache: Cache) -> None:
    if k_cache.dtype not in cpu.CACHE_DTYPES:
        raise ValueError(
            f"implementation='cpu' supports float32 and bfloat16 caches but k_cache has dtype {k_cache.dtype}; "
            "use implementation='xla'"
        )
    if not cpu.available():
        raise ValueError(
            "implementation='cpu' needs a native kernel, which is not available here: install a C++ compiler (g++ or "
            "clang++), or use implementation='xla'; the log of pallas_kernels.native has the reason"
        )
