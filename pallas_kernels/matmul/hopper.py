"""Products of tiles of rows with matrices of a stack, on GPUs of compute capability 9.0 (Hopper).

The matrices are read where they are: a matrix of a layer, or of an expert of a layer, is one of the stack, and its number is
data. Integers are converted on their way from memory to the tensor cores.

A thread block computes some columns of a tile for some of the inputs. One warpgroup copies (TMA), two compute (WGMMA), each
its own columns, with a ring of buffers between them that is not drained between tiles:

  copy      | x0 w0 | x1 w1 | x2 w2 | x3 w3 | ...       waits until the buffer to overwrite has been read
  compute   |       | x0 w0 | x1 w1 | x2 w2 | ...       waits until the buffer is full

WGMMA reads both operands from shared memory, in one dtype: each computing warpgroup converts its columns of int8 or int4
into one of two further buffers while the tensor cores multiply those in the other (`hopper_operands`). 8-bit floats are
multiplied as they are, with rows that are rounded to them. The tensor cores keep fewer than 24 bits of their sums, so those
of each step are added up in float32 registers, each times the scales of its inputs if there are such: the numbers of a
checkpoint in blocks of 128 x 128 are multiplied as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.matmul.hopper_operands import in_every_row, load_columns, write_int4, write_int8
from pallas_kernels.matmul.hopper_spec import WARPGROUPS, Item, Spec
from pallas_kernels.matmul.hopper_support import (
    GRANULE,
    GRANULES,
    MATRIX,
    ROW,
    Tiles,
    depth_of,
    modeled,
    one_matrix,
    sum_of_splits,
)
from pallas_kernels.matmul.int4 import Int4Weight
from pallas_kernels.matmul.narrow import float8_rows
from pallas_kernels.matmul.weights import Float8Weight, Int8Weight, ScaledWeight
from pallas_kernels.pallas_types import Ref, Scratch

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of its functions

WARPGROUP_ROWS = 64  # rows of one WGMMA
# Registers per thread when two warpgroups compute and one copies, 504 in total.
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40
STORED = 64  # columns that a warpgroup writes to memory at a time


def multiply(x: Float[Array, "T K"], w: ScaledWeight, *, tiles: Tiles | None = None, interpret: object = False) -> jax.Array:
    """float32[T, N]: x times the matrix of `w` that its layer selects. If `tiles` is None, they are modeled.

    With a `Float8Weight`, x is rounded to 8 bits, with a scale for each row.
    """
    assert w.layer is not None, "a stack without a selected layer is no matrix"
    num_rows = x.shape[0]
    if tiles is None:
        rows = 64 if num_rows <= 64 else 128
        tiles = modeled(num_rows, -(-num_rows // rows), w.shape, w.values.dtype, rows=rows)
    factors = None
    if isinstance(w, Float8Weight):
        x, factors = float8_rows(x)
    x, work = one_matrix(x, tiles.rows)
    y = sum_of_splits(multiply_tiles(x, w, work, w.layer, tiles=tiles, interpret=interpret))[:num_rows]
    return y if factors is None else y * factors


def multiply_tiles(
    x: Float[Array, "P K"],
    w: Float[Array, "G K N"] | ScaledWeight,
    work: Int[Array, "tiles columns"],
    first: Int[Array, ""],
    *,
    tiles: Tiles,
    interpret: object = False,
) -> Float[Array, "splits P N"]:
    """float32: for every tile of `work`, its rows of x times its matrix. Rows that no tile stores are uninitialized.

    Args:
      x: [P, K], P a multiple of 8; each tile has `min(tiles.rows, P)` rows of it.
      w: [G, K, N] in the dtype of x, or with scales.
      work: see `hopper_support.NUM_COLUMNS`.
      first: i32, the matrix that `work` calls 0.
      tiles: how the work is divided. The results of its splits are to be added up.
      interpret: passed to `plgpu.kernel`.
    """
    scaled = isinstance(w, ScaledWeight)
    values: jax.Array = w.values if scaled else w
    operands = {"scales": w.scales} if scaled else {}
    if isinstance(w, Int4Weight) and w.offsets is not None:
        operands["offsets"] = w.offsets
    num_rows, num_inputs = x.shape
    num_columns = w.shape[-1]
    most_items = (work.shape[0] - 1) * tiles.splits * -(-num_columns // (WARPGROUPS * tiles.columns))
    spec = Spec(
        tiles=tiles,
        rows_in=min(tiles.rows, num_rows),
        blocks=min(tiles.blocks, most_items),
        depth=depth_of(values.dtype, num_inputs),
        num_inputs=num_inputs,
        num_columns=num_columns,
        of_outputs=isinstance(w, Int8Weight) or (isinstance(w, Float8Weight) and not w.in_blocks),
        in_blocks=isinstance(w, Float8Weight) and w.in_blocks,
        size=w.size if isinstance(w, Int4Weight) else None,
        dtype=np.dtype(x.dtype),
        stored=np.dtype(values.dtype),
        interpreted=bool(interpret),
    )
    operands = {"work": work, "first": first.reshape(1), "x": x, "w": values, **operands}

    def kernel(*refs: Ref) -> None:
        _multiply(dict(zip([*operands, "out"], refs, strict=True)), spec)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, num_rows, spec.num_columns), jnp.float32),
        grid=(spec.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret or None,
        kernel_name="multiply_tiles",
    )(*operands.values())


def _multiply(refs: dict[str, Ref], spec: Spec) -> None:
    """Runs in every warpgroup of the block."""
    tiles = spec.tiles
    ring = (tiles.stages, WARPGROUPS, spec.stored_rows, tiles.columns)
    x_layout = _tiled(spec.depth, spec.dtype.itemsize)
    w_layout = _tiled(math.gcd(64, spec.num_columns), spec.stored.itemsize)
    if spec.is_float8:
        ring, w_layout = (*ring[:2], tiles.columns, spec.depth), x_layout
    factors = spec.factors_of(refs)
    scratch: dict[str, Scratch] = {
        "x_buffer": plgpu.SMEM((tiles.stages, tiles.rows, spec.depth), spec.dtype, transforms=x_layout),
        "w_buffer": plgpu.SMEM(ring, spec.stored, transforms=w_layout),
        "out_buffer": plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS, STORED), jnp.float32, transforms=_tiled(STORED, 4)),
        "full": plgpu.Barrier(num_arrivals=1 + WARPGROUPS * (1 + len(factors)), num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    }
    if spec.converted:
        scratch["operand"] = plgpu.SMEM(
            (WARPGROUPS, 2, spec.depth, tiles.columns), spec.dtype, transforms=_tiled(tiles.columns, 2)
        )
    for name in factors:
        shape = (*ring[:2], spec.factor_rows, tiles.columns)
        scratch[f"{name}_buffer"] = plgpu.SMEM(shape, refs[name].dtype)

    def body(*allocated: Ref) -> None:
        block = _Block(refs | dict(zip(scratch, allocated, strict=True)), spec)

        @pl.when(block.warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            block.for_each_item(block.compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(block.warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            block.await_last_reads(block.for_each_item(block.copy))

    pl.run_scoped(body, *scratch.values(), collective_axes="warpgroup")


def _tiled(columns: int, itemsize: int) -> tuple[Any, Any]:
    """The shared-memory layout of rows of a multiple of that many numbers, with the widest swizzle that divides them."""
    swizzle = next(width for width in (128, 64, 32) if (itemsize * columns) % width == 0)
    return plgpu.TilingTransform((GRANULE, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


class _Block:
    """The work of one thread block."""

    def __init__(self, refs: dict[str, Ref], spec: Spec) -> None:
        self.refs, self.spec = refs, spec
        self.factors = spec.factors_of(refs)
        self.warpgroup = lax.axis_index("warpgroup")

    def for_each_item(self, work: Callable[[Item, jax.Array], None]) -> jax.Array:
        """Calls `work` with every item of this block and the number of steps before it; returns that of all steps.

        Blocks that run at the same time have the same columns and other rows, so that they read the same weights.
        """
        spec, refs = self.spec, self.refs
        block, blocks = lax.axis_index("block"), spec.blocks
        num_tiles = refs["work"][refs["work"].shape[0] - 1, 0]
        num_items = num_tiles * spec.items_per_tile
        per_split = jnp.int32(spec.steps_per_split)

        def item(i: jax.Array, steps_before: jax.Array) -> jax.Array:
            ordinal = block + i * blocks
            part = lax.div(ordinal, num_tiles)
            tile = ordinal - part * num_tiles
            column = lax.div(part, jnp.int32(spec.tiles.splits))
            split = part - column * spec.tiles.splits
            matrix, row, granules = (refs["work"][tile, number] for number in (MATRIX, ROW, GRANULES))
            first_step = split * per_split
            made = Item(
                matrix=refs["first"][0] + matrix,
                row=row,
                granules=granules,
                column=column * (WARPGROUPS * spec.tiles.columns),
                split=split,
                first_step=first_step,
                num_steps=jnp.minimum(per_split, spec.steps - first_step),
            )
            work(made, steps_before)
            return steps_before + made.num_steps

        mine = lax.div(num_items - block + (blocks - 1), jnp.int32(blocks))
        return lax.fori_loop(0, mine, item, jnp.int32(0))

    def first_column(self, item: Item, warpgroup: jax.Array | int) -> jax.Array:
        """The first column of a warpgroup. Beyond the last column there are others, which are computed twice."""
        columns = self.spec.tiles.columns
        return jnp.minimum(item.column + warpgroup * columns, self.spec.num_columns - columns)

    # The copying warpgroup. Steps are counted over all items of the block: step n uses buffer n % stages.

    def slot(self, n: jax.Array) -> jax.Array:
        return lax.rem(n, jnp.int32(self.spec.tiles.stages))

    def copy(self, item: Item, steps_before: jax.Array) -> None:
        spec, refs = self.spec, self.refs

        def step(i: jax.Array, _: None) -> None:
            n = steps_before + i
            slot = self.slot(n)
            pl.when(n >= spec.tiles.stages)(lambda: plgpu.barrier_wait(refs["free"].at[slot]))
            inputs = pl.ds((item.first_step + i) * spec.depth, spec.depth)
            stored = pl.ds((item.first_step + i) * spec.stored_rows, spec.stored_rows)
            full, target = refs["full"].at[slot], refs["x_buffer"].at[slot]
            if spec.rows_in < spec.tiles.rows:
                target = target.at[pl.ds(0, spec.rows_in)]
            plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(item.row, spec.rows_in), inputs], target, full)
            for warpgroup in range(WARPGROUPS):
                columns = pl.ds(self.first_column(item, warpgroup), spec.tiles.columns)
                part = (columns, inputs) if spec.is_float8 else (stored, columns)
                source = refs["w"].at[item.matrix, *part]
                plgpu.copy_gmem_to_smem(source, refs["w_buffer"].at[slot, warpgroup], full)
                for name in self.factors:
                    rows = pl.ds(spec.factor_row(item.first_step + i), spec.factor_rows)
                    source = refs[name].at[item.matrix, rows, columns]
                    plgpu.copy_gmem_to_smem(source, refs[f"{name}_buffer"].at[slot, warpgroup], full)

        lax.fori_loop(0, item.num_steps, step, None)

    def await_last_reads(self, num_steps: jax.Array) -> None:
        def step(n: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self.refs["free"].at[self.slot(n)])

        lax.fori_loop(jnp.maximum(num_steps - self.spec.tiles.stages, 0), num_steps, step, None)

    # The computing warpgroups.

    def compute(self, item: Item, steps_before: jax.Array) -> None:
        work = self.summed_steps if self.spec.is_float8 else self.one_sum
        self.store(item, work(item, steps_before))

    def summed_steps(self, item: Item, steps_before: jax.Array) -> jax.Array:
        """The products of each step, added up in registers."""
        spec, refs = self.spec, self.refs
        shape = (spec.tiles.rows, spec.tiles.columns)
        zeros = jnp.zeros(shape, jnp.float32)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            slot = self.slot(steps_before + i)
            # From memory, before the wait for this step's copies.
            scales = self.scales(item, shape, item.first_step + i) if spec.in_blocks else None
            plgpu.barrier_wait(refs["full"].at[slot])
            x, w = refs["x_buffer"].at[slot], refs["w_buffer"].at[slot, self.warpgroup]

            def multiply(acc: Ref) -> jax.Array:
                plgpu.wgmma(acc, x, plgpu.transpose_ref(w, (1, 0)))
                return acc[...]

            if spec.interpreted:
                part = jnp.dot(x[...].astype(jnp.float32), w[...].astype(jnp.float32).T)
                plgpu.commit_smem()  # WGMMA needs no fence here, but the race detector requires one for plain reads
            else:
                part = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(refs["free"].at[slot])
            return total + (part if scales is None else part * scales)

        start = zeros if spec.interpreted else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        return lax.fori_loop(0, item.num_steps, step, start)

    def one_sum(self, item: Item, steps_before: jax.Array) -> jax.Array:
        """The products of all steps, summed by the tensor cores."""
        spec, refs, warpgroup = self.spec, self.refs, self.warpgroup

        def multiply(acc: Ref) -> jax.Array:
            def step(i: jax.Array, _: None) -> None:
                n = steps_before + i
                slot = self.slot(n)
                plgpu.barrier_wait(refs["full"].at[slot])
                w = refs["w_buffer"].at[slot, warpgroup]
                if spec.converted:
                    operand = refs["operand"].at[warpgroup, lax.rem(n, jnp.int32(2))]
                    self.convert(slot, operand)
                    w = operand
                plgpu.wgmma(acc, refs["x_buffer"].at[slot], w)
                # The product before this one has been computed.
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(refs["free"].at[self.slot(n - 1)]))

            lax.fori_loop(0, item.num_steps, step, None)
            return acc[...]

        result = pl.run_scoped(multiply, plgpu.ACC((spec.tiles.rows, spec.tiles.columns), jnp.float32))
        plgpu.barrier_arrive(refs["free"].at[self.slot(steps_before + item.num_steps - 1)])
        return result

    def convert(self, slot: jax.Array, target: Ref) -> None:
        """Writes the numbers of a step [depth, columns] as those of the products."""
        own = {name: self.refs[f"{name}_buffer"].at[slot, self.warpgroup] for name in ("w", *self.factors)}
        if self.spec.is_int4:
            write_int4(own["w"], target, own["scales"], own.get("offsets"), interpreted=self.spec.interpreted)
        else:
            write_int8(own["w"], target, interpreted=self.spec.interpreted)
        plgpu.commit_smem()

    def scales(self, item: Item, shape: tuple[int, ...], *step: jax.Array) -> jax.Array:
        """Those of this warpgroup's columns (in a step), in every row of a result."""
        columns = pl.ds(self.first_column(item, self.warpgroup), self.spec.tiles.columns)
        scales = self.refs["scales"].at[item.matrix, *step, columns]
        layout, interpreted = plgpu.Layout.WGMMA, self.spec.interpreted
        return in_every_row(load_columns(scales, layout, interpreted=interpreted), shape, layout, interpreted=interpreted)

    def store(self, item: Item, result: jax.Array) -> None:
        spec, refs = self.spec, self.refs
        column = self.first_column(item, self.warpgroup)
        if spec.of_outputs:
            result = result * self.scales(item, result.shape)
        is_own = item.column + self.warpgroup * spec.tiles.columns < spec.num_columns
        buffer = refs["out_buffer"].at[self.warpgroup]
        for row in range(0, spec.tiles.rows, WARPGROUP_ROWS):
            for part in range(0, spec.tiles.columns, STORED):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                buffer[...] = result[row : row + WARPGROUP_ROWS, part : part + STORED]
                plgpu.commit_smem()
                for first in range(0, WARPGROUP_ROWS, GRANULE):

                    @pl.when(is_own & ((row + first) // GRANULE < item.granules))
                    def _(first: int = first, row: int = row, part: int = part) -> None:
                        rows = pl.ds(item.row + row + first, GRANULE)
                        target = refs["out"].at[item.split, rows, pl.ds(column + part, STORED)]
                        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(first, GRANULE)], target)
