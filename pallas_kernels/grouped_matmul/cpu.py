"""The native CPU kernel: loading it, its panel layout, and calling it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.cpu_only import cpu_only
from pallas_kernels.matmul import cpu as matrix

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Num

_LIBRARY = "grouped_matmul"
_TARGET = "pallas_kernels_grouped_matmul"


def available() -> bool:
    """True when the kernel can be called; compiles it if necessary (seconds, once per machine)."""
    loaded = native.load(_LIBRARY, {_TARGET: "PallasKernelsGroupedMatmul"})
    return loaded and matrix.ensure_loaded()  # the matmul library reports the panel layout


def pack(w: Num[np.ndarray, "G K N"], *, gated: bool) -> Num[np.ndarray, "G P steps width group"]:
    """Panels [G, P, steps, width, group] of matrices [G, K, N]: the panels of `matmul.cpu.pack` for each group."""
    first = matrix.pack(w[0], gated=gated)
    panels = np.empty((w.shape[0], *first.shape), w.dtype)  # filled in place, because experts make up most of a model
    panels[0] = first
    for group in range(1, w.shape[0]):
        panels[group] = matrix.pack(w[group], gated=gated)
    return panels


def pack_scales(scales: Float[np.ndarray, "G N"], *, gated: bool) -> Float[np.ndarray, "G P width"]:
    """float32[G, P, width] of the scales float32[G, N] of the columns."""
    return np.stack([matrix.pack_scales(row, gated=gated) for row in scales])


@partial(jax.jit, static_argnames=("num_outputs", "gated", "blocks"))
def multiply(
    x: Float[Array, "T K"],
    panels: Num[Array, "*layers G P steps width group"],
    scales: Float[Array, "*groups"],
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
    *,
    num_outputs: int,
    gated: bool,
    blocks: tuple[int, int, bool] | None = None,
) -> Float[Array, "T N"]:
    """float32[T, num_outputs]; x is float32[T, K]. Layout of the weights: see `PackedGroups`.

    The groups may be those of several layers; `scales` then keeps its layer axis. `blocks` as for `matmul.cpu.multiply`.
    """
    return _multiply(x, panels, scales, group_sizes, first_group, num_outputs, gated, blocks)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
def _multiply(
    x: Float[Array, "T K"],
    panels: Num[Array, "*layers G P steps width group"],
    scales: Float[Array, "*groups"],
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
    num_outputs: int,
    gated: bool,
    blocks: tuple[int, int, bool] | None,
) -> Float[Array, "T N"]:
    if not available():
        raise RuntimeError(
            f"PackedGroups need the native kernels, which cannot be loaded here "
            f"({native.unavailable_reason() or 'the log has the reason'}); "
            f"call prepare(w, ...) in this process to get weights that plain XLA can use"
        )
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((x.shape[0], num_outputs), jnp.float32))
    format, size, rounds = blocks or (0, 0, False)
    options = {"format": np.int64(format), "block_size": np.int64(size), "rounds": rounds}
    checked = cpu_only(x, what="PackedGroups were")
    return call(checked, panels, scales, group_sizes, first_group, gated=gated, **options)


@_multiply.defjvp
def _no_derivative(num_outputs: int, gated: bool, blocks: object, primals: tuple, tangents: tuple) -> NoReturn:
    raise ValueError(
        "PackedGroups have no derivative, and neither do products with them; differentiate with the plain array that "
        "they were prepared from, as load_params(..., prepare=None) returns it"
    )
