"""Causal attention of whole sequences, one after another, without a cache: for training.

    tokens         [ a0 a1 a2 | b0 b1 b2 b3 | c0 | - - ]        T = 10; two tokens of padding
    query_starts   [ 0          3             7    8   8 ]      S = 4: three sequences and an unused row

The same as `ragged_attention` if every chunk is a whole sequence. On a CPU the native kernel of `ragged_attention` computes
the results, so that they have the bits of generation. Derivatives are computed in tiles, from the inputs and the
results: no array of T x T numbers exists (FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.packed_attention import tiles
from pallas_kernels.packed_attention.cpu import packed_attention_cpu
from pallas_kernels.packed_attention.reference import packed_attention_reference
from pallas_kernels.ragged_attention import Scoring
from pallas_kernels.ragged_attention.cpu import call as cpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["IMPLEMENTATIONS", "packed_attention"]

IMPLEMENTATIONS = {
    "reference": packed_attention_reference,
    "tiles": tiles.packed_attention_tiles,
    "cpu": packed_attention_cpu,
}


def packed_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    query_starts: Int[Array, " bounds"],
    scoring: Scoring,
    *,
    implementation: str | None = None,
) -> Float[Array, "T H D"]:
    """Attention of every token to those of its own sequence up to itself, in the dtype of q; zero for padding.

    Differentiable in reverse mode with respect to q, k, v and the arrays of `scoring`, except with "reference", which is
    plain JAX and has every derivative.

    Args:
      q: [T, H, D], H a multiple of K; query head h reads KV head h // (H // K).
      k, v: [T, K, D].
      query_starts: i32[S + 1]; sequence s is the tokens [query_starts[s], query_starts[s + 1]). Non-decreasing, from 0;
        tokens from the last one on are padding.
      scoring: scale, window, cap, slopes and sinks.
      implementation: a key of `IMPLEMENTATIONS`. None: "cpu" if the program is lowered for a CPU with native kernels and k
        is float32 or bfloat16, otherwise "tiles". "reference" computes T x T scores per head.

    Raises:
      ValueError: a shape is invalid, or the implementation is unknown or not available here.
    """
    num_tokens, num_heads, head_dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (num_tokens, head_dim) or num_heads % k.shape[1]:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; they must be [T, H, D], [T, K, D] and "
            "[T, K, D], with H a multiple of K"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r} but must be one of {names}, or None for the fastest")
    has_kernel = implementation in (None, "cpu") and k.dtype in cpu.CACHE_DTYPES and cpu.available()
    if implementation == "cpu" and not has_kernel:
        raise ValueError(
            f"implementation='cpu' needs a native kernel and keys in float32 or bfloat16, but k is {k.dtype} or no C++ "
            "compiler was found; use implementation='tiles'"
        )
    scoring = jax.tree.map(jnp.asarray, scoring)
    if implementation == "reference":
        return packed_attention_reference(q, k, v, query_starts, scoring)
    forward: Callable[..., Any] = packed_attention_cpu if implementation == "cpu" else tiles.packed_attention_tiles
    if implementation is None and has_kernel:
        forward = partial(lax.platform_dependent, cpu=packed_attention_cpu, default=tiles.packed_attention_tiles)
    return tiles.with_derivative(forward)(q, k, v, query_starts, scoring)
