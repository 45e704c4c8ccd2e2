"""`linear` and `swiglu`: products with a weight in any storage format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels import gpu_target, tpu_target
from pallas_kernels.matmul import ampere_support, cpu, halves, hopper_support, tpu_support
from pallas_kernels.matmul.division import DividedArray, Division
from pallas_kernels.matmul.int4 import Int4Weight, size_of
from pallas_kernels.matmul.narrow import float8_rows, float16_rows, int8_rows, is_narrowed
from pallas_kernels.matmul.paired import PairedWeight
from pallas_kernels.matmul.weights import Float8Weight, Int8Weight, PackedWeight, ScaledWeight, Weight, inputs_last, unscaled
from pallas_kernels.ordered_sum import ordered_sum

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_Scaled = TypeVar("_Scaled", bound=ScaledWeight)


def linear(
    x: Float[Array, "*rows K"],
    w: Weight | PairedWeight | DividedArray,
    *,
    residual: Float[Array, "*rows N"] | None = None,
    num_rows: Int[Array, ""] | None = None,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*rows N"]:
    """x @ w (+ residual), [..., N]; products are summed in float32.

    With a `PackedWeight`, the result of a row is bit-identical regardless of the number and contents of the other rows.

    Args:
      x: [..., K], float32, bfloat16 or float16.
      w: [K, N].
      residual: [..., N] in the dtype of x; added in float32, before the result is rounded once.
      num_rows: i32 scalar. Rows of a matrix x from num_rows on are padding: their results are meaningless, but finite if
        x is. A `PackedWeight` does not compute them.
      out_dtype: dtype of the result; None means the dtype of x.
    """
    _check(x, w)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if residual is not None and (residual.shape != (*x.shape[:-1], w.shape[1]) or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype}{list(residual.shape)}, but must be {x.dtype}{[*x.shape[:-1], w.shape[1]]}"
        )
    if isinstance(w, PackedWeight):
        if w.gated:
            raise ValueError("w was prepared with gated=True, for swiglu; for linear, prepare with gated=False")
        return _packed(x, w, residual, num_rows).astype(out_dtype)
    if isinstance(w, PairedWeight):
        return _paired(x, w, residual, num_rows).astype(out_dtype)
    if isinstance(w, DividedArray) or (isinstance(w, ScaledWeight) and w.division is not None and w.division.in_order):
        return _product_in_order(x, w, residual, out_dtype)
    if gpu_target.is_gpu() and not isinstance(w, ScaledWeight) and x.dtype == out_dtype and x.dtype.itemsize == 2:
        # A GPU's library sums in float32, adds the residual, and rounds once. XLA would have it write float32, and launch
        # kernels that convert the residual before and the result after it. Without the barrier XLA would also have it add a
        # bias and apply an activation, and then copy the layer's weight out of the stack for it.
        y = _dot(x, w, out_dtype)
        return jax.lax.optimization_barrier(y if residual is None else y + residual)
    y = _product(x, w)
    return (y if residual is None else y + residual.astype(jnp.float32)).astype(out_dtype)


def swiglu(
    x: Float[Array, "*rows K"], w: Weight | PairedWeight, *, num_rows: Int[Array, ""] | None = None, shards: int = 1
) -> Float[Array, "*rows F"]:
    """silu(x @ gate) * (x @ up), [..., F] in the dtype of x, computed in float32.

    Args:
      x: [..., K], float32, bfloat16 or float16.
      w: [K, 2F]: the columns of gate, then those of up. A `PackedWeight` must be prepared with gated=True.
      num_rows: as for `linear`.
      shards: w consists of this many [gate | up] pairs of equal width, side by side, one per device.
    """
    _check(x, w)
    if isinstance(w, PackedWeight):
        if not w.gated:
            raise ValueError("w was prepared with gated=False; for swiglu, prepare it with gated=True")
        if shards != 1:
            raise ValueError(f"shards is {shards}, but a PackedWeight cannot be sharded; pass an array or an Int8Weight")
        return _packed(x, w, None, num_rows).astype(x.dtype)
    if isinstance(w, PairedWeight):
        return _paired(x, w, None, num_rows).astype(x.dtype)
    return gated(_product(x, w), shards).astype(x.dtype)


def reads_in_place(w: object, dtype: DTypeLike, division: Division | None = None) -> TypeGuard[ScaledWeight]:
    """Whether `linear` reads this weight [K, N], or one layer of this stack [L, K, N], where it is; see `at_layer`.

    If not, a slice of the layer is the better operand: XLA may fuse it. `dtype` is that of the activations; `division` is
    how the weight is divided, if the program is one of several devices.
    """
    if not isinstance(w, ScaledWeight):
        return False
    if rounds_rows(w) or (isinstance(w, Int8Weight) and w.inputs_last):
        # XLA reads the slice of a layer where it is; but each device rounds its part of a row by itself.
        return division is not None and division.of_inputs
    if division is None:
        return has_kernel(w.shape, w.values.dtype, dtype, size=size_of(w)) or tpu_support.multiplies(w, w.shape)
    shape = division.share(w.shape)
    of_gpu = has_kernel(shape, w.values.dtype, dtype, size=size_of(w), divided=True)
    return of_gpu or tpu_support.multiplies(w, shape, divided=True)


def rounds_rows(w: object) -> TypeGuard[Int8Weight | Float8Weight]:
    """Whether the program being traced has XLA multiply in 8 bits: rows of x are rounded to the dtype of `w`."""
    if isinstance(w, Int8Weight):
        return w.rounds_rows
    return isinstance(w, Float8Weight) and not w.in_blocks and tpu_target.multiplies("fp8")


def has_kernel(
    shape: tuple[int, ...], stored: DTypeLike, dtype: DTypeLike, *, size: int | None = None, divided: bool = False
) -> bool:
    """Whether a GPU's kernel multiplies activations of `dtype` with weights [G, K, N]; see `hopper_support.supported`."""
    kernels = (hopper_support, ampere_support)
    return any(kernel.supported(shape, stored, dtype, size=size, divided=divided) for kernel in kernels)


def gated(y: Float[Array, "*rows columns"], shards: int = 1) -> Float[Array, "*rows F"]:
    """silu(gate) * up, [..., F], of y [..., 2F], which is `shards` pairs [gate | up] of equal width, side by side."""
    if shards < 1 or y.shape[-1] % (2 * shards):
        raise ValueError(
            f"w holds {shards} pairs [gate | up], so its width must be a multiple of {2 * shards}, not {y.shape[-1]}"
        )
    # Not as [..., shards, 2, F]: XLA would then split the columns of the product itself and, on a TPU, transpose w.
    gate, up = jnp.split(y.reshape(*y.shape[:-1], shards, -1), 2, axis=-1)
    return (jax.nn.silu(gate) * up).reshape(*y.shape[:-1], -1)


def _check(x: jax.Array, w: Weight | PairedWeight | DividedArray) -> None:
    if len(w.shape) != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {list(x.shape)} does not fit w {list(w.shape)}; they must be [..., K] and [K, N]")


def _product(x: jax.Array, w: jax.Array | ScaledWeight) -> jax.Array:
    """float32[..., N]"""
    if not isinstance(w, ScaledWeight):
        if is_narrowed(x.dtype, w.dtype):
            rows, factors = float16_rows(x)
            return _dot(rows, w) * factors
        return _dot(x, w)
    if w.division is not None:
        return _divided_product(x, w, w.division)
    if rounds_rows(w):
        return _rounded_product(x, w)
    if isinstance(w, Int8Weight) and w.inputs_last:
        return _product_of_halves(x, w)
    if tpu_support.multiplies(w, w.shape):
        return jax.lax.platform_dependent(x, w, tpu=_product_on_tpu, default=_scaled_product)
    if not has_kernel(w.shape, w.values.dtype, x.dtype, size=size_of(w)):
        return _scaled_product(x, w)
    return jax.lax.platform_dependent(x, w, cuda=_product_in_place, default=_scaled_product)


def _dot(x: jax.Array, w: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    contract_last_with_first = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, contract_last_with_first, preferred_element_type=dtype)


def _scaled_product(x: jax.Array, w: ScaledWeight) -> jax.Array:
    """With a `Float8Weight`, activations are not rounded."""
    w = _of_layer(w)
    if isinstance(w, Int4Weight):
        return _dot(x, w.dequantize().astype(x.dtype))
    values, scales = w.values, w.scales
    if isinstance(w, Float8Weight):
        values = unscaled(w, values, scales)
        if w.in_blocks:
            return _dot(x, values.astype(x.dtype))
    return _dot(x, values.astype(x.dtype)) * jnp.expand_dims(scales, range(x.ndim - 1))


def _rounded_product(x: jax.Array, w: Int8Weight | Float8Weight) -> jax.Array:
    """Rows of x are rounded to the dtype of `w`. Sums of int8 are exact for up to 2^31 / 127^2 inputs, some 130,000."""
    w, last = _of_layer(w), x.ndim - 1
    scales = jnp.expand_dims(w.scales, range(last))
    if isinstance(w, Int8Weight):
        rows, factors = int8_rows(x)
        sums = jax.lax.dot_general(rows, w.values, (((last,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * factors * scales
    rows, factors = float8_rows(x)
    sums = jax.lax.dot_general(rows, w.values, (((last,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return sums * factors * scales


@jax.custom_jvp
def _product_of_halves(x: jax.Array, w: Int8Weight) -> jax.Array:
    w = _of_layer(w)
    y = halves.multiply(x.reshape(-1, x.shape[-1]), w.values).reshape(*x.shape[:-1], -1)
    return y * jnp.expand_dims(w.scales, range(x.ndim - 1))


@_product_of_halves.defjvp
def _derivative_of_halves(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """That of rows that are not rounded."""
    x, w = primals
    w_in_order = replace(w, values=w.inputs_first, inputs_last=False)
    return _product_of_halves(x, w), jax.jvp(lambda x: _scaled_product(x, w_in_order), (x,), tangents[:1])[1]


def _of_layer(w: _Scaled) -> _Scaled:
    """The matrix that a weight selects, as one without layers."""
    if w.layer is None:
        return w
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, w.layer, keepdims=False), replace(w, layer=None))


def _product_in_order(
    x: jax.Array, w: DividedArray | ScaledWeight, residual: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
    """x @ w (+ residual), of whose inputs each device has a share: the parts are added in the order of the devices."""
    division = w.division
    assert division is not None
    assert division.axis is not None, "the inputs are divided over an axis"
    assert division.of_inputs, "only products of parts of the inputs have to be added up"
    mesh, axis, parts = division.mesh, division.axis, _partition(w, division)
    lead, stored = x.shape[:-1], w.values if isinstance(w, DividedArray) else replace(w, division=None)
    # As in `linear`; here the parts are rounded once more, as in the sum that XLA would insert.
    is_narrow = gpu_target.is_gpu() and isinstance(w, DividedArray) and x.dtype == dtype and x.dtype.itemsize == 2

    def local(x: jax.Array, w: jax.Array | ScaledWeight, residual: jax.Array | None) -> jax.Array:
        y = _dot(x, w, dtype) if is_narrow and isinstance(w, jax.Array) else _product(x, w)
        return ordered_sum(y, axis, mesh.size, residual=residual, dtype=dtype)

    whole = PartitionSpec()
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(None, axis), parts, whole), out_specs=whole, check_vma=False
    )
    flat = x.reshape(-1, x.shape[-1])
    return run(flat, stored, None if residual is None else residual.reshape(-1, w.shape[1])).reshape(*lead, w.shape[1])


def _partition(w: DividedArray | ScaledWeight, division: Division) -> Any:
    """The PartitionSpec of each part of a weight; of a plain one, that of its values."""
    axis = division.axis
    layers = (None,) * (w.values.ndim - 2)
    of_matrix = (axis, None) if division.of_inputs else (None, axis)
    if isinstance(w, DividedArray):
        return PartitionSpec(*of_matrix)
    of_values = of_matrix[::-1] if inputs_last(w) else of_matrix
    # Scales of blocks of inputs are divided like the inputs.
    of_scales = of_matrix if w.scales.ndim == w.values.ndim else of_matrix[1:]
    return replace(
        jax.tree.map(lambda _: PartitionSpec(*layers, *of_scales), replace(w, division=None)),
        values=PartitionSpec(*layers, *of_values),  # pyright: ignore[reportArgumentType]
        layer=None if w.layer is None else PartitionSpec(),  # pyright: ignore[reportArgumentType]
    )


def _divided_product(x: jax.Array, w: ScaledWeight, division: Division) -> jax.Array:
    mesh, axis, of_inputs, _ = division
    lead = (None,) * (x.ndim - 1)

    def local(x: jax.Array, w: ScaledWeight) -> jax.Array:
        y = _product(x, w)
        return jax.lax.psum(y, axis) if of_inputs and axis is not None else y

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(*lead, axis if of_inputs else None), _partition(w, division)),
        out_specs=PartitionSpec(*lead, None if of_inputs else axis),
        check_vma=False,
    )
    return run(x, replace(w, division=None))


def _product_in_place(x: jax.Array, w: ScaledWeight) -> jax.Array:
    """On a GPU, by a kernel that is imported on first use: it loads Pallas."""
    if w.layer is None:
        w = replace(jax.tree.map(lambda part: part[None], w), layer=jnp.int32(0))
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, Int8Weight | Int4Weight) and gpu_target.generation() == "ampere":
        from pallas_kernels.matmul import ampere

        y = ampere.multiply(rows, w)
    else:
        from pallas_kernels.matmul import hopper

        y = hopper.multiply(rows, w)
    return y.reshape(*x.shape[:-1], -1)


def _product_on_tpu(x: jax.Array, w: Int4Weight) -> jax.Array:
    """By a kernel that is imported on first use: it loads Pallas."""
    from pallas_kernels.matmul import tpu

    if w.layer is None:
        w = replace(jax.tree.map(lambda part: part[None], w), layer=jnp.int32(0))
    y = tpu.multiply(x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], -1)


def _packed(x: jax.Array, w: PackedWeight, residual: jax.Array | None, num_rows: jax.Array | None) -> jax.Array:
    """float32[..., N]"""
    if num_rows is not None and x.ndim != 2:
        raise ValueError(f"num_rows counts the rows of a matrix, but x is {list(x.shape)}")

    def rows(array: jax.Array) -> jax.Array:
        return array.reshape(-1, array.shape[-1]).astype(jnp.float32)

    y = cpu.multiply(
        rows(x),
        w.panels,
        w.scales,
        w.layer,
        None if residual is None else rows(residual),
        num_rows,
        num_outputs=w.num_outputs,
        gated=w.gated,
        blocks=None if w.blocks is None else (w.blocks.number, w.blocks.size, w.rounds),
    )
    return y.reshape(*x.shape[:-1], w.num_outputs)


@jax.custom_jvp
def _paired(x: jax.Array, w: PairedWeight, residual: jax.Array | None, num_rows: jax.Array | None) -> jax.Array:
    """float32[..., N]: the packed product, with the derivative of the plain one."""
    return _packed(x, w.packed, residual, num_rows)


@_paired.defjvp
def _paired_derivative(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, w, residual, _ = primals
    x_tangent, w_tangent, residual_tangent, _ = tangents

    def product(x: jax.Array, plain: jax.Array, residual: jax.Array | None) -> jax.Array:
        y = _product(x, plain.astype(x.dtype))
        y = gated(y) if w.packed.gated else y
        return y if residual is None else y + residual.astype(jnp.float32)

    tangent = jax.jvp(product, (x, w.plain, residual), (x_tangent, w_tangent.plain, residual_tangent))[1]
    return _paired(*primals), tangent
