"""Splits a fused query-key-value projection and applies rotary embeddings to the queries and keys.

On an accelerator, the compiler fuses the rotation with neighboring operations. On a CPU, XLA computes the slices one by one
on a single thread; a native kernel does it in one pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import native

if TYPE_CHECKING:
    from jaxtyping import Array, Float

__all__ = ["IMPLEMENTATIONS", "rotary", "rotate"]

_TARGET = "pallas_kernels_rotary"
Parts = tuple[jax.Array, jax.Array, jax.Array]


def rotate(x: Float[Array, "T H D"], cos: Float[Array, "T P"], sin: Float[Array, "T P"]) -> Float[Array, "T H D"]:
    """`x` [T, heads, D] with each pair (x[i], x[i + P]) rotated by angle i, in float32; dimensions from 2P on are kept.

    `cos` and `sin` are f32[T, P], 2P <= D (RoPE, arXiv:2104.09864, in the half-split form of GPT-NeoX and Llama).
    """
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned if 2 * pairs == x.shape[-1] else [*turned, rest], axis=-1).astype(x.dtype)


def _rotary_xla(qkv: jax.Array, cos: jax.Array, sin: jax.Array, *, num_heads: int) -> Parts:
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    turned = rotate(qkv[:, : num_heads + num_kv_heads], cos, sin)
    return turned[:, :num_heads], turned[:, num_heads:], qkv[:, num_heads + num_kv_heads :]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _native(qkv: jax.Array, cos: jax.Array, sin: jax.Array, num_heads: int) -> Parts:
    tokens, all_heads, dim = qkv.shape
    num_kv_heads = (all_heads - num_heads) // 2
    shapes = [jax.ShapeDtypeStruct((tokens, n, dim), jnp.float32) for n in (num_heads, num_kv_heads, num_kv_heads)]
    parts = jax.ffi.ffi_call(_TARGET, shapes)(qkv.astype(jnp.float32), cos, sin)
    q, k, v = (part.astype(qkv.dtype) for part in parts)
    return q, k, v


@_native.defjvp
def _derivative(num_heads: int, primals: Parts, tangents: Parts) -> tuple[Parts, Parts]:
    turned = jax.jvp(partial(_rotary_xla, num_heads=num_heads), primals, tangents)[1]
    return _native(*primals, num_heads), turned  # the results have the same bits as without a derivative


def _rotary_cpu(qkv: jax.Array, cos: jax.Array, sin: jax.Array, *, num_heads: int) -> Parts:
    return _native(qkv, cos, sin, num_heads)


IMPLEMENTATIONS = {"xla": _rotary_xla, "cpu": _rotary_cpu}


def rotary(
    qkv: Float[Array, "T heads D"],
    cos: Float[Array, "T P"],
    sin: Float[Array, "T P"],
    *,
    num_heads: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
    """(q [T, H, D], k [T, K, D], v [T, K, D]) of a fused projection, with q and k rotated as `rotate` does.

    Args:
      qkv: [T, H + 2K, D]: query heads, then key heads, then value heads.
      cos, sin: f32[T, P], 2P <= D.
      num_heads: H.
      implementation: a key of `IMPLEMENTATIONS`; None selects one by the platform that the program is lowered for.

    Raises:
      ValueError: a shape is invalid, or the implementation is unknown or not available here.
    """
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[1] <= num_heads or (qkv.shape[1] - num_heads) % 2:
        raise ValueError(f"qkv is {list(qkv.shape)}, but must be [T, H + 2K, D] with H = {num_heads} and K at least 1")
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != qkv.shape[0] or 2 * cos.shape[1] > qkv.shape[2]:
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} must both be [T, P] with T = {qkv.shape[0]} and "
            f"P at most D / 2 = {qkv.shape[2] / 2:g}"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r} but must be one of {names}, or None for the fastest")
    native_kernel = implementation != "xla" and native.load("rotary", {_TARGET: "PallasKernelsRotary"})
    if implementation == "cpu" and not native_kernel:
        raise ValueError(
            f"implementation='cpu' needs a native kernel, which is not available here: "
            f"{native.unavailable_reason() or 'the log has the reason'}; use implementation='xla'"
        )

    def run(name: str):
        return lambda qkv, cos, sin: IMPLEMENTATIONS[name](qkv, cos, sin, num_heads=num_heads)

    if implementation is not None:
        return run(implementation)(qkv, cos, sin)
    kernels = {"cpu": run("cpu")} if native_kernel else {}
    return jax.lax.platform_dependent(qkv, cos, sin, **kernels, default=run("xla"))
