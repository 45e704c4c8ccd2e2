"""RMSNorm and LayerNorm whose rows do not depend on one another.

On an accelerator, the compiler fuses a norm with neighboring operations. On a CPU, XLA chooses the order of a row's sum by
the number of rows, so the same row is rounded differently in a step of 4 tokens and in one of 64. The native CPU kernel
sums every row in the same order and skips padding rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["IMPLEMENTATIONS", "layer_norm", "rms_norm"]

_TARGET = "pallas_kernels_norm"


def rms_norm(
    x: Float[Array, "T *shape E"],
    weight: Float[Array, "... E"],
    *,
    eps: float,
    offset: float = 0.0,
    num_rows: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T *shape E"]:
    """`x` over its root mean square along the last axis, times `weight + offset`; in float32 (arXiv:1910.07467).

    With the native CPU kernel, the result of a row is bit-identical regardless of the number and contents of the other
    rows.

    Args:
      x: [T, ..., E], float32, bfloat16 or float16; the result has its dtype.
      weight: [E], or the shape of some trailing axes of x.
      eps: added to the mean square.
      num_rows: i32 scalar. Entries along the first axis of x from num_rows on are padding: their results are meaningless,
        but finite if x is.
      implementation: a key of `IMPLEMENTATIONS`; None selects one by the platform that the program is lowered for.

    Raises:
      ValueError: a shape is invalid, or the implementation is unknown or not available here.
    """
    return _norm(x, weight, None, num_rows, (eps, offset, False), implementation)


def layer_norm(
    x: Float[Array, "T *shape E"],
    weight: Float[Array, "... E"],
    bias: Float[Array, "... E"] | None,
    *,
    eps: float,
    offset: float = 0.0,
    num_rows: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T *shape E"]:
    """`x` with mean 0 and variance 1 along the last axis, times `weight + offset`, plus `bias`; in float32.

    Source: arXiv:1607.06450. `bias` has the shape of `weight`; for everything else see `rms_norm`.
    """
    return _norm(x, weight, bias, num_rows, (eps, offset, True), implementation)


Settings = tuple[float, float, bool]  # eps, offset, whether the mean is subtracted


def _norm_xla(x: jax.Array, weight: jax.Array, bias: jax.Array | None, num_rows: jax.Array, settings: Settings) -> jax.Array:
    eps, offset, centered = settings
    x32 = x.astype(jnp.float32)
    leading = range(x.ndim - weight.ndim)
    weight = jnp.expand_dims(weight, leading).astype(jnp.float32)
    if centered:
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = x32 * scale * (weight + offset if offset else weight)
    return (y if bias is None else y + jnp.expand_dims(bias, leading).astype(jnp.float32)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _norm_cpu(x: jax.Array, weight: jax.Array, bias: jax.Array | None, num_rows: jax.Array, settings: Settings) -> jax.Array:
    eps, offset, centered = settings
    others = [part.astype(jnp.float32).reshape(-1) for part in (weight, bias) if part is not None]
    result = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), jnp.float32)
    rows_an_entry = math.prod(x.shape[1:-1])
    rows = x.astype(jnp.float32).reshape(result.shape)
    y = jax.ffi.ffi_call(_TARGET, result)(
        rows, num_rows * rows_an_entry, *others, eps=np.float32(eps), offset=np.float32(offset), centered=centered
    )
    return y.reshape(x.shape).astype(x.dtype)


@_norm_cpu.defjvp
def _derivative(settings: Settings, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    tangent = jax.jvp(partial(_norm_xla, settings=settings), primals, tangents)[1]
    return _norm_cpu(*primals, settings), tangent  # the result has the same bits as without a derivative


IMPLEMENTATIONS = {"xla": _norm_xla, "cpu": _norm_cpu}


def _norm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    num_rows: jax.Array | None,
    settings: Settings,
    implementation: str | None,
) -> jax.Array:
    if x.ndim < 2 or weight.ndim < 1 or weight.shape != x.shape[x.ndim - weight.ndim :] or weight.ndim >= x.ndim:
        raise ValueError(f"weight is {list(weight.shape)}, but must be some of the last axes of x {list(x.shape)}, not all")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias is {list(bias.shape)}, but must have the shape of weight, {list(weight.shape)}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r} but must be one of {names}, or None for the fastest")
    native_kernel = implementation != "xla" and native.load("norm", {_TARGET: "PallasKernelsNorm"})
    if implementation == "cpu" and not native_kernel:
        raise ValueError(
            f"implementation='cpu' needs a native kernel, which is not available here: "
            f"{native.unavailable_reason() or 'the log has the reason'}; use implementation='xla'"
        )
    rows = jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32)
    arguments = (x, weight, bias, rows)

    def run(name: str):
        return lambda x, weight, bias, rows: IMPLEMENTATIONS[name](x, weight, bias, rows, settings)

    if implementation is not None:
        return run(implementation)(*arguments)
    kernels = {"cpu": run("cpu")} if native_kernel else {}
    return jax.lax.platform_dependent(*arguments, **kernels, default=run("xla"))
