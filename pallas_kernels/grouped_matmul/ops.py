"""`grouped_matmul` and `grouped_swiglu`: products with weights in any storage format."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.grouped_matmul.paired import PairedGroups
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.weights import GroupedWeight, PackedGroups
from pallas_kernels.grouped_matmul.xla import grouped_matmul_ragged_dot, grouped_matmul_tiles
from pallas_kernels.matmul import Float8Weight, Int4Weight, Int8Weight, ScaledWeight, tpu_support
from pallas_kernels.matmul.int4 import size_of
from pallas_kernels.matmul.narrow import float8_rows, float16_rows, int8_rows, is_narrowed
from pallas_kernels.matmul.ops import gated, has_kernel, rounds_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def _grouped_matmul_tpu(*arguments: Any) -> jax.Array:
    """`grouped_matmul_tpu`, imported on first use: it loads Pallas."""
    from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu

    return grouped_matmul_tpu(*arguments)


def _grouped_matmul_gpu(*arguments: Any) -> jax.Array:
    """`grouped_matmul_gpu`, imported on first use: it loads Pallas."""
    from pallas_kernels.grouped_matmul.gpu import grouped_matmul_gpu

    return grouped_matmul_gpu(*arguments)


IMPLEMENTATIONS = {
    "reference": grouped_matmul_reference,
    "ragged_dot": grouped_matmul_ragged_dot,
    "tiles": grouped_matmul_tiles,
    "tpu": _grouped_matmul_tpu,
    "gpu": _grouped_matmul_gpu,
}


def grouped_matmul(
    x: Float[Array, "T E"],
    w: GroupedWeight | PairedGroups,
    group_sizes: Int[Array, " X"],
    *,
    first_group: int | Int[Array, ""] = 0,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """x[t] @ w[first_group + g] for every row t of every group g: [T, F], summed in float32.

        rows of x     | group 0 | group 1 |   | group 3      | no group |      group_sizes: 2, 2, 0, 3

    Work is proportional to the number of rows that have a group. Rows past the last group are zero in the result. With
    `PackedGroups`, the result of a row is bit-identical regardless of the number and contents of the other rows. Rows of x
    are rounded to the 8 bits of w, each with its own scale, as in `matmul.linear`: with `Int8Weight.rounds_rows`, and with a
    `Float8Weight` where a device multiplies 8-bit floats.

    Args:
      x: [T, E], float32, bfloat16 or float16, rows sorted by group.
      w: [G, E, F]. `PackedGroups` must be prepared with gated=False.
      group_sizes: i32[X], X <= G, the number of rows in each group; their sum is at most T.
      first_group: index of the weight of group 0, in [0, G - X]; an int or a traced i32. Selects a layer in a stack of
        all layers' weights.
      out_dtype: dtype of the result; None means the dtype of x.
      implementation: a key of `IMPLEMENTATIONS`. None picks the fastest for the platform that the program is lowered
        for. On TPUs this is the compiler's grouped kernel, or ours if w is a stack of whole tiles, or in whole tiles and an
        `Int4Weight` or one that rounds rows of x, and the program is for one device or inside a shard_map; on GPUs of
        compute capability 8.x and 9.0 it is ours if w consists of whole tiles; elsewhere it is a loop over tiles of rows.
        `PackedGroups` have a single implementation.

    Raises:
      ValueError: a shape or dtype is invalid, or the implementation is unknown.
    """
    _check(x, w, group_sizes, first_group, implementation)
    if isinstance(w, PackedGroups) and w.gated:
        raise ValueError("w was prepared with gated=True, for grouped_swiglu; for grouped_matmul, prepare with gated=False")
    if isinstance(w, PairedGroups) and w.packed.gated:
        raise ValueError("w was paired with gated=True, for grouped_swiglu; for grouped_matmul, pair with gated=False")
    return _product(x, w, group_sizes, first_group, implementation).astype(x.dtype if out_dtype is None else out_dtype)


def grouped_swiglu(
    x: Float[Array, "T E"],
    w: GroupedWeight | PairedGroups,
    group_sizes: Int[Array, " X"],
    *,
    first_group: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """silu(x @ gate) * (x @ up), [T, F] in the dtype of x, computed in float32; see `grouped_matmul`.

    Args:
      w: [G, E, 2F]: the columns of gate, then those of up. `PackedGroups` must be prepared with gated=True.
    """
    _check(x, w, group_sizes, first_group, implementation)
    if isinstance(w, PackedGroups):
        if not w.gated:
            raise ValueError("w was prepared with gated=False; for grouped_swiglu, prepare it with gated=True")
        return _product(x, w, group_sizes, first_group, implementation).astype(x.dtype)
    if isinstance(w, PairedGroups):
        if not w.packed.gated:
            raise ValueError("w was paired with gated=False; for grouped_swiglu, pair it with gated=True")
        return _product(x, w, group_sizes, first_group, implementation).astype(x.dtype)
    return gated(_product(x, w, group_sizes, first_group, implementation)).astype(x.dtype)


def _product(
    x: jax.Array,
    w: GroupedWeight | PairedGroups,
    group_sizes: jax.Array,
    first_group: int | jax.Array,
    implementation: str | None,
) -> jax.Array:
    """float32[T, F]"""
    first = jnp.asarray(first_group, jnp.int32)
    if isinstance(w, PairedGroups):
        return _paired_product(x, w, group_sizes, first)
    if isinstance(w, PackedGroups):
        if w.layer is not None:  # the groups of all layers, one after another
            first = w.layer * w.shape[0] + first
        return cpu.multiply(
            x.astype(jnp.float32),
            w.panels,
            w.scales,
            group_sizes,
            first,
            num_outputs=w.num_outputs,
            gated=w.gated,
            blocks=None if w.blocks is None else (w.blocks.number, w.blocks.size, w.rounds),
        )
    return _plain_product(x, w, group_sizes, first, implementation)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _plain_product(
    x: jax.Array,
    w: jax.Array | ScaledWeight,
    group_sizes: jax.Array,
    first: jax.Array,
    implementation: str | None,
) -> jax.Array:
    rounds = rounds_rows(w)
    if implementation is not None:
        x = _rounded(x, w) if rounds and implementation != "tpu" else x
        return IMPLEMENTATIONS[implementation](x, w, group_sizes, first)
    if isinstance(w, Int4Weight):
        ours = tpu_support.multiplies(w, w.shape)
    else:
        is_stack = w.shape[0] != group_sizes.shape[0]
        ours = (is_stack or rounds) and tpu_support.supports(w.shape) and tpu_support.may_be_lowered()
    on_tpu = _grouped_matmul_tpu if ours else grouped_matmul_ragged_dot
    stored = w.values.dtype if isinstance(w, ScaledWeight) else w.dtype
    if is_narrowed(x.dtype, stored):
        rows, factors = float16_rows(x)
        return _plain_product(rows, w, group_sizes, first, implementation) * factors
    if rounds:
        on_tpu = on_tpu if ours else _of_rounded_rows
        return jax.lax.platform_dependent(x, w, group_sizes, first, tpu=on_tpu, default=_of_rounded_rows)
    kernels = {"cuda": _grouped_matmul_gpu} if has_kernel(w.shape, stored, x.dtype, size=size_of(w)) else {}
    return jax.lax.platform_dependent(x, w, group_sizes, first, tpu=on_tpu, **kernels, default=grouped_matmul_tiles)


def _rounded(x: jax.Array, w: object) -> jax.Array:
    """float32[T, E]: the numbers that the 8 bits of each row stand for."""
    rows, factors = float8_rows(x) if isinstance(w, Float8Weight) else int8_rows(x)
    return rows.astype(jnp.float32) * factors


def _of_rounded_rows(x: jax.Array, w: jax.Array | ScaledWeight, group_sizes: jax.Array, first: jax.Array) -> jax.Array:
    """Where the kernel does not run, which multiplies 8 bits by 8 bits."""
    return grouped_matmul_tiles(_rounded(x, w), w, group_sizes, first)


@_plain_product.defjvp
def _derivative(implementation: str | None, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The derivative of XLA's own grouped product; the loops and kernels do not define one."""

    def product(x: jax.Array, w: jax.Array | ScaledWeight, group_sizes: jax.Array, first: jax.Array) -> jax.Array:
        if isinstance(w, Int8Weight):
            w = (w.values * w.scales[:, None, :]).astype(x.dtype)
        elif isinstance(w, Int4Weight):
            w = w.dequantize().astype(x.dtype)
        return grouped_matmul_ragged_dot(x, w, group_sizes, first)

    return jax.jvp(product, primals, tangents)


@jax.custom_jvp
def _paired_product(x: jax.Array, w: PairedGroups, group_sizes: jax.Array, first: jax.Array) -> jax.Array:
    """float32[T, F]: the packed product, with the derivative of the plain one."""
    return _product(x, w.packed, group_sizes, first, None)


@_paired_product.defjvp
def _paired_derivative(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, w, group_sizes, first = primals
    x_tangent, w_tangent, _, _ = tangents

    def product(x: jax.Array, plain: jax.Array) -> jax.Array:
        y = grouped_matmul_ragged_dot(x, plain.astype(x.dtype), group_sizes, first)
        return gated(y) if w.packed.gated else y

    return _paired_product(*primals), jax.jvp(product, (x, w.plain), (x_tangent, w_tangent.plain))[1]


def _check(
    x: jax.Array,
    w: GroupedWeight | PairedGroups,
    group_sizes: jax.Array,
    first_group: int | jax.Array,
    implementation: str | None,
) -> None:
    if len(w.shape) != 3 or x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit w {list(w.shape)}; they must be [T, E] and [G, E, F]")
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}, but must be int32[X]")
    num_groups, num_weights = group_sizes.shape[0], w.shape[0]
    if not 1 <= num_groups <= num_weights:
        raise ValueError(
            f"group_sizes has {num_groups} groups, but must have 1 to {num_weights}, the number of weights in w"
        )
    if isinstance(first_group, int) and not 0 <= first_group <= num_weights - num_groups:
        raise ValueError(
            f"first_group is {first_group}, but w has {num_weights} weights and group_sizes has {num_groups} groups; "
            f"it must be in [0, {num_weights - num_groups}]"
        )
    if implementation is None:
        return
    if isinstance(w, PackedGroups | PairedGroups):
        kind = type(w).__name__
        raise ValueError(f"implementation is {implementation!r}, but {kind} have a single implementation; pass None")
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r} but must be one of {names}, or None for the fastest")
