"""The native CPU kernel: loading it, its panel layout, and calling it."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.aligned import aligned_empty
from pallas_kernels.cpu_only import cpu_only

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Num

_LIBRARY = "matmul"
_TARGET = "pallas_kernels_matmul"


def ensure_loaded() -> bool:
    """Compiles and registers the kernel the first time; True when it can be called."""
    return native.load(_LIBRARY, {_TARGET: "PallasKernelsMatmul"})


@functools.cache
def panel_width() -> int:
    """Output columns in one panel on this CPU (8 to 32). The kernel must be loaded."""
    return int(native.function(_LIBRARY, "pallas_kernels_matmul_panel_width")())


@functools.cache
def narrow_group() -> int:
    """Values per column in one step of a bfloat16 or int8 panel: 2 if the CPU multiplies bfloat16, otherwise 1.

    With 2, activations are rounded to bfloat16 before they are multiplied with such a weight. The kernel must be loaded.
    """
    return int(native.function(_LIBRARY, "pallas_kernels_matmul_narrow_group")())


def pack(w: Num[np.ndarray, "K N"], *, gated: bool) -> Num[np.ndarray, "P steps width group"]:
    """Panels [P, steps, width, group] of a matrix [K, N], padded with zeros.

    Step s of a panel holds rows s * group to s * group + group - 1 of its columns, see `narrow_group`. With `gated`, the
    matrix is [gate | up], N = 2F, and each panel holds width/2 columns of gate followed by the same columns of up, so that
    one tile has both factors of its outputs in registers.
    """
    group = narrow_group() if w.dtype in (np.int8, jnp.bfloat16) else 1
    parts = 1 + gated
    share = panel_width() // parts
    shape = (-(-w.shape[1] // (parts * share)), -(-w.shape[0] // group), parts, share, group)
    panels = aligned_empty(shape, w.dtype)
    fill_panels(panels, w)
    return panels.reshape(*shape[:2], -1, group)


def pack_scales(scales: Float[np.ndarray, " N"], *, gated: bool) -> Float[np.ndarray, "P width"]:
    """float32[P, width] of the scales float32[N] of a matrix's columns."""
    return pack(scales[None, :], gated=gated)[:, 0, :, 0]


def fill_panels(panels: Num[np.ndarray, "P *steps parts share group"], w: Num[np.ndarray, "K N"]) -> None:
    """Writes a matrix [K, N] into panels in one pass, however many axes the steps have; parts = 2 for [gate | up]."""
    count, *steps, parts, share, group = panels.shape
    rows, columns = math.prod(steps) * group, count * share
    for part, source in enumerate(np.split(w, parts, axis=1)):
        if source.shape != (rows, columns):
            padded = np.zeros((rows, columns), w.dtype)
            padded[: source.shape[0], : source.shape[1]] = source
            source = padded
        split = source.reshape(*steps, group, count, share)
        panels[..., part, :, :] = np.moveaxis(split, (-2, -1, -3), (0, -2, -1))


@functools.partial(jax.jit, static_argnames=("num_outputs", "gated", "blocks"))
def multiply(
    x: Float[Array, "M K"],
    panels: Num[Array, "*layers P steps width group"],
    scales: Float[Array, "*layers P width"] | None,
    layer: Int[Array, ""] | None,
    residual: Float[Array, "M N"] | None,
    num_rows: Int[Array, ""] | None,
    *,
    num_outputs: int,
    gated: bool,
    blocks: tuple[int, int, bool] | None = None,
) -> Float[Array, "M N"]:
    """float32[M, num_outputs] = x[M, K] @ panels (* scales) (+ residual), zero from row `num_rows` on.

    The layout of the panels is that of `PackedWeight`; `layer` selects those of one layer, if they are those of several.
    `blocks`, if the panels hold blocks: the number of their format, their size, and whether to round to bfloat16.
    """
    return _multiply(x, panels, scales, layer, residual, num_rows, num_outputs, gated, blocks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def _multiply(
    x: Float[Array, "M K"],
    panels: Num[Array, "*layers P steps width group"],
    scales: Float[Array, "*layers P width"] | None,
    layer: Int[Array, ""] | None,
    residual: Float[Array, "M N"] | None,
    num_rows: Int[Array, ""] | None,
    num_outputs: int,
    gated: bool,
    blocks: tuple[int, int, bool] | None,
) -> Float[Array, "M N"]:
    if not ensure_loaded():
        raise RuntimeError(
            f"a PackedWeight needs the native kernels, which cannot be loaded here "
            f"({native.unavailable_reason() or 'the log has the reason'}); "
            f"call prepare(w, ...) in this process to get a weight that plain XLA can use"
        )
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    rows = jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32)
    others = [array for array in (scales, residual) if array is not None]
    result = jax.ShapeDtypeStruct((x.shape[0], num_outputs), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, result)
    format, size, rounds = blocks or (0, 0, False)
    options = {"format": np.int64(format), "block_size": np.int64(size), "rounds": rounds}
    has_residual = residual is not None
    return call(
        cpu_only(x, what="a PackedWeight was"),
        panels,
        index,
        rows,
        *others,
        gated=gated,
        has_residual=has_residual,
        **options,
    )


@_multiply.defjvp
def _no_derivative(num_outputs: int, gated: bool, blocks: object, primals: tuple, tangents: tuple) -> NoReturn:
    raise ValueError(
        "a PackedWeight has no derivative, and neither do products with it; differentiate with the plain array that it "
        "was prepared from, as load_params(..., prepare=None) returns it"
    )
