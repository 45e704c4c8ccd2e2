"""The native CPU kernel: loading it, its panel layout, and calling it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import native

_LIBRARY = "grouped_matmul"
_TARGET = "fastgen_grouped_matmul"


def available() -> bool:
    """True when the kernel could be built, or is built now (seconds, once per machine). Never raises."""
    return native.load(_LIBRARY, Path(__file__).with_name("cpu.cc"), {_TARGET: "FastgenGroupedMatmul"})


@functools.cache
def panel_width() -> int:
    """Output columns in one panel on this CPU (8 to 32). The kernel must be loaded."""
    return int(native.function(_LIBRARY, "fastgen_grouped_matmul_panel_width")())


def pack(w: np.ndarray, *, gated: bool) -> np.ndarray:
    """Panels [G, P, K, width] of matrices [G, K, N], the last of each filled up with zeros.

    With `gated` a matrix is [gate | up], N = 2F, and each panel holds width/2 columns of the gate, then the same
    columns of up, so that one tile has both factors of its outputs in registers.
    """
    parts = 2 if gated else 1
    groups, depth, columns = w.shape[0], w.shape[1], w.shape[2] // parts
    share = panel_width() // parts
    count = -(-columns // share)
    panels = np.zeros((groups, count, depth, parts, share), w.dtype)
    for part in range(parts):
        for start in range(0, columns, share):
            width = min(share, columns - start)
            piece = w[:, :, part * columns + start : part * columns + start + width]
            panels[:, start // share, :, part, :width] = piece
    return panels.reshape(groups, count, depth, parts * share)


# Passes its argument through on the CPU; lowering it for anything else is the user's mistake, with a remedy.
_cpu_only_p = Primitive("packed_groups_on_cpu")
_cpu_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_cpu_only_p, lambda context, x: [x], platform="cpu")


def _refuse(context: mlir.LoweringRuleContext, x: mlir.Value) -> NoReturn:
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(
        f"PackedGroups were lowered for platform {platforms!r}, but their layout is only for 'cpu'; "
        f"call prepare(w, platform={platforms!r}) on the original weights"
    )


mlir.register_lowering(_cpu_only_p, _refuse)


@functools.partial(jax.jit, static_argnames=("num_outputs", "gated"))
def multiply(
    x: jax.Array,
    panels: jax.Array,
    scales: jax.Array,
    group_sizes: jax.Array,
    first_group: jax.Array,
    *,
    num_outputs: int,
    gated: bool,
) -> jax.Array:
    """float32[T, num_outputs]; x is float32[T, K]. Layout of the weights: see `PackedGroups`."""
    if not available():
        raise RuntimeError(
            f"PackedGroups need the native kernels, which cannot be loaded here "
            f"({native.unavailable_reason() or 'the log has the reason'}); "
            f"call prepare(w, ...) in this process to get weights that plain XLA can use"
        )
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((x.shape[0], num_outputs), jnp.float32))
    return call(_cpu_only_p.bind(x), panels, scales, group_sizes, first_group, gated=gated)
