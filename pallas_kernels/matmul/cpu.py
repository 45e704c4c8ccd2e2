"""The native CPU kernel: loading it, its panel layout, and calling it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import native

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
    parts = np.split(w, 2, axis=1) if gated else [w]
    share = panel_width() // len(parts)
    return np.concatenate([_panels(part, share, group) for part in parts], axis=2)


def pack_scales(scales: Float[np.ndarray, " N"], *, gated: bool) -> Float[np.ndarray, "P width"]:
    """float32[P, width] of the scales float32[N] of a matrix's columns."""
    return pack(scales[None, :], gated=gated)[:, 0, :, 0]


def _panels(w: np.ndarray, width: int, group: int) -> np.ndarray:
    depth, columns = w.shape
    count, steps = -(-columns // width), -(-depth // group)
    padded = np.zeros((steps * group, count * width), w.dtype)
    padded[:depth, :columns] = w
    return np.ascontiguousarray(padded.reshape(steps, group, count, width).transpose(2, 0, 3, 1))


# Returns its argument on the CPU; lowering it for another platform raises an error that names the remedy.
_cpu_only_p = Primitive("packed_weight_on_cpu")
_cpu_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_cpu_only_p, lambda context, x: [x], platform="cpu")


def _refuse(context: mlir.LoweringRuleContext, x: mlir.Value) -> NoReturn:
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(
        f"a PackedWeight was lowered for platform {platforms!r}, but its layout is only for 'cpu'; "
        f"call prepare(w, platform={platforms!r}) on the original weight"
    )


mlir.register_lowering(_cpu_only_p, _refuse)


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
    return call(_cpu_only_p.bind(x), panels, index, rows, *others, gated=gated, has_residual=has_residual, **options)


@_multiply.defjvp
def _no_derivative(num_outputs: int, gated: bool, blocks: object, primals: tuple, tangents: tuple) -> NoReturn:
    raise ValueError(
        "a PackedWeight has no derivative, and neither do products with it; differentiate with the plain array that it "
        "was prepared from, as load_params(..., prepare=None) returns it"
    )
