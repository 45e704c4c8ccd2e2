"""Weights and results in the registers of the four warps of an Ampere's thread block.

An mma multiplies 16 rows by 8 columns over 16 inputs. Each warp has all rows of a tile and 32 of its 128 columns, so that
each weight is read and converted once. A thread reads four adjacent bytes of a row of weights, one for each of the warp's
four groups of 8 columns:

    column of the tile        | 32 w + 4 c + j |
    column of the product     | 32 j + 8 w + c |    c of the mma's 8 columns of warp w in group j

The operand of an mma has two inputs of a column side by side, in bytes of two words; and a thread's results are 8 adjacent
columns. What is a change of names alone, and the conversion of bytes, is inlined Mosaic GPU, since Pallas has no names for
them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jax.typing import DTypeLike

from pallas_kernels.matmul.ampere_support import COLUMNS
from pallas_kernels.matmul.hopper_support import GRANULE
from pallas_kernels.matmul.int4 import float_halves
from pallas_kernels.pallas_types import Layout, Ref

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of their functions
mgpu: Any = mosaic
INPUTS = 16  # of an mma
_WARPS, _GROUPS, _WARP_COLUMNS = 4, 4, 32
_ALIGNMENT = 16  # bytes that are stored at once

# Layouts.


def words() -> Layout:
    """[16, COLUMNS] bytes: a thread has 4 columns of the 4 inputs whose weights it multiplies."""
    tiling = plgpu.Tiling(((INPUTS, COLUMNS), (8, _WARP_COLUMNS), (2, _GROUPS)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1)


def right(dtype: DTypeLike) -> Layout:
    """The weights of an mma."""
    return plgpu.Layout.MMA_RHS(dtype, m_warps=1)


def left(dtype: DTypeLike) -> Layout:
    """The rows of an mma."""
    return plgpu.Layout.MMA_LHS(dtype, m_warps=1)


def sums(dtype: DTypeLike) -> Layout:
    """The results of mmas."""
    return plgpu.Layout.MMA_ACC(dtype, m_warps=1)


def results(*, of_words: bool) -> Layout:
    """[GRANULE, columns]: the results in the order of columns. Without `of_words`, that of the products is the same."""
    if of_words:
        tiling = plgpu.Tiling(((GRANULE, COLUMNS), (8, _WARP_COLUMNS), (8, 8)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-2, -3), vector_dim=-1)
    tiling = plgpu.Tiling(((GRANULE, _WARP_COLUMNS), (8, 8), (2,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


# The registers of a thread: which of one layout are which of another.


def pairs_of_words(registers: np.ndarray) -> np.ndarray:
    """[halves, 2]: which words have the two inputs of each register of an operand."""
    return registers.reshape(2, 2)


def by_granule(registers: np.ndarray) -> np.ndarray:
    """[granules, groups]: the registers of results, of two numbers each."""
    tiles = registers.size // (_GROUPS * 2)
    return registers.reshape(tiles, _GROUPS, 2).swapaxes(1, 2).reshape(2 * tiles, _GROUPS)


def order_of_columns(registers: list[Any], number: Any) -> list[Any]:
    """The 8 adjacent results of a row in 4 registers of two numbers; `number(register, i)` is one of them."""
    return [number(register, i) for i in range(2) for register in registers]


# Operands.


def int8_operand(numbers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[16, COLUMNS] int8 in `words` as the weights of an mma."""
    kind = plgpu.ShapeDtypeStruct(numbers.shape, dtype, layout=right(dtype))
    convert = _to_bfloat16 if dtype == jnp.bfloat16 else _to_float16

    @plgpu.inline_mgpu(arg_types=(words(),), return_type=kind)
    def operand(_: object, numbers: Any) -> Any:
        made = np.empty((_GROUPS, 2), dtype=object)
        for half, (one, other) in enumerate(pairs_of_words(numbers.registers)):
            for group in range(0, _GROUPS, 2):
                both = vector.shuffle(one, other, [group, group + 4, group + 1, group + 5])
                made[group, half], made[group + 1, half] = convert(both)
        return _array(made, right(dtype), numbers.shape)

    return operand(numbers)


def float_operand(numbers: jax.Array) -> jax.Array:
    """[16, COLUMNS] of 16 bits in `words` as the weights of an mma."""
    dtype = numbers.dtype
    kind = plgpu.ShapeDtypeStruct(numbers.shape, dtype, layout=right(dtype))

    @plgpu.inline_mgpu(arg_types=(words(),), return_type=kind)
    def operand(_: object, numbers: Any) -> Any:
        made = np.empty((_GROUPS, 2), dtype=object)
        for half, (one, other) in enumerate(pairs_of_words(numbers.registers)):
            for group in range(_GROUPS):
                made[group, half] = vector.shuffle(one, other, [group, group + 4])
        return _array(made, right(dtype), numbers.shape)

    return operand(numbers)


def int4_halves(
    numbers: jax.Array, factors: list[tuple[jax.Array, jax.Array | None]], dtype: DTypeLike, *, interpreted: bool
) -> list[jax.Array]:
    """The lower and the upper halves of bytes [16, COLUMNS] times scales, plus offsets, rounded to `dtype`.

    `factors`: scales and offsets [COLUMNS] of each half.
    """

    def spread(vector: jax.Array) -> jax.Array:
        rows = lax.broadcast_in_dim(vector, numbers.shape, [1])
        return rows if interpreted else plgpu.layout_cast(rows, words())

    made = []
    for half, (scales, offsets) in zip(float_halves(numbers), factors, strict=True):
        factor, term = half.dequantized(scales, offsets)
        values = half.values * spread(factor)
        made.append((values if term is None else values + spread(term)).astype(dtype))
    return made


def _to_bfloat16(both: ir.Value) -> list[ir.Value]:
    """Two registers of two bfloat16 of four int8. GPUs convert integers slowly, and before Hopper do not add bfloat16.

    With an exponent for numbers from 128 on, the lower 7 bits of a byte are added to 128, and its sign is the lowest bit of
    the exponent: it makes 256 of 128, which is subtracted.
    """
    i8, i32, bf16 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.BF16Type.get()
    exponent = _splat(ir.VectorType.get((4,), i8), 0x43)
    minus_one = _splat(ir.VectorType.get((2,), bf16), -1.0)

    def masked(bits: ir.Value, mask: int) -> ir.Value:
        return vector.bitcast(ir.VectorType.get((2,), bf16), arith.andi(bits, _splat(bits.type, mask)))

    made = []
    for first in (0, 2):
        numbers = vector.bitcast(ir.VectorType.get((1,), i32), vector.shuffle(both, exponent, [first, 4, first + 1, 4]))
        made.append(vector.fma(masked(numbers, 0xFF80FF80), minus_one, masked(numbers, 0xFF7FFF7F)))
    return made


def _to_float16(both: ir.Value) -> list[ir.Value]:
    """The same in float16, in which a byte with its sign inverted is added to 1024."""
    i8, f16 = ir.IntegerType.get_signless(8), ir.F16Type.get()
    bytes_type, pair_type = ir.VectorType.get((4,), i8), ir.VectorType.get((2,), f16)
    both, exponent = arith.xori(both, _splat(bytes_type, 0x80)), _splat(bytes_type, 0x64)
    bias = _splat(pair_type, 1024.0 + 128.0)
    pairs = [vector.shuffle(both, exponent, [first, 4, first + 1, 4]) for first in (0, 2)]
    return [arith.subf(vector.bitcast(pair_type, pair), bias) for pair in pairs]


def _splat(kind: ir.VectorType, number: int | float) -> ir.Value:
    element = kind.element_type
    if isinstance(element, ir.IntegerType):
        attribute = ir.IntegerAttr.get(element, number if number < 2 ** (element.width - 1) else number - 2**element.width)
    else:
        attribute = ir.FloatAttr.get(element, number)
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, attribute))


# Results.


def in_order(sums_of: jax.Array, dtype: DTypeLike, *, of_words: bool) -> jax.Array:
    """The results of mmas in `results`; `dtype` is that of their operands."""
    kind = plgpu.ShapeDtypeStruct(sums_of.shape, jnp.float32, layout=results(of_words=of_words))

    def number(register: ir.Value, i: int) -> ir.Value:
        return vector.extract(register, [], [i])

    @plgpu.inline_mgpu(arg_types=(sums(dtype),), return_type=kind)
    def relabel(_: object, found: Any) -> Any:
        registers = by_granule(found.registers)
        if of_words:
            made = np.empty(len(registers), dtype=object)
            eight = ir.VectorType.get((8,), ir.F32Type.get())
            for granule, row in enumerate(registers):
                made[granule] = vector.from_elements(eight, order_of_columns(list(row), number))
            registers = made
        return _array(registers, results(of_words=of_words), found.shape)

    return relabel(sums_of)


def store_from(target: Ref, numbers: jax.Array, first: jax.Array, *, of_words: bool, interpreted: bool) -> None:
    """Writes the columns of `numbers` [GRANULE, COLUMNS] from the first on, a multiple of 16."""
    if interpreted:

        def store(part: jax.Array, _: None) -> None:
            target[:, pl.ds(16 * part, 16)] = lax.dynamic_slice(numbers, (0, 16 * part), (GRANULE, 16))

        lax.fori_loop(lax.div(first, jnp.int32(16)), COLUMNS // 16, store, None)
        return
    layout = results(of_words=of_words)
    column = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, numbers.shape, 1), layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def store_registers(_: object, target: ir.Value, numbers: Any, stores: Any) -> None:
        index = ir.IndexType.get()
        origin = next(iter(numbers.layout.thread_idxs(numbers.shape)))  # of a thread's first register
        width = COLUMNS // numbers.registers.size
        registers = zip(numbers.registers.flat, stores.registers.flat, strict=True)
        for i, (register, stored) in enumerate(registers):
            row, column = origin[0], arith.addi(origin[1], arith.constant(index, i * width))
            with mgpu.when(vector.extract(stored, [], [0])):
                vector.store(register, target, [row, column], alignment=min(_ALIGNMENT, 4 * register.type.shape[0]))

    store_registers(target, numbers, column >= first)


def _array(registers: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> Any:
    layout = layout.to_mgpu()
    return mgpu.FragmentedArray(_registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None)
