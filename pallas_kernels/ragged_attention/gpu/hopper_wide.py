"""The body of the attention kernel for Hopper where heads are wider than 256 numbers.

The float32 results of 64 rows and 512 columns do not fit into the registers of one warpgroup. Two warpgroups share the rows
of a tile, each with half of the columns; both compute all scores. As in `hopper`, a third one copies, and one of the two
computes weights while the other multiplies:

  columns of values    | 0 ... half | half ... V |
  warpgroup                   0            1           64 rows, the same queries and keys

With latents, values are read from the buffer of their keys, and nothing is copied twice.
"""

from __future__ import annotations

import functools
import math
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

from pallas_kernels.pallas_types import Ref, Scratch
from pallas_kernels.ragged_attention.gpu.hopper import WARPGROUP_ROWS, Block, swizzle_of, tiled_rows
from pallas_kernels.ragged_attention.gpu.softmax_tile import ROW, Rows, Spec, Tile, blocks_of, over_steps, rows_of_query

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of their functions
mgpu: Any = mosaic
COMPUTING = 2  # warpgroups
_BLANKED_COLUMNS = 64  # at a time: a thread has no registers for all


def tile_rows(group: int, head_dim: int, *, partial: bool) -> tuple[int, int, int]:
    """The numbers of rows of a tile that are read, computed and stored, for every D."""
    del head_dim
    used = rows_of_query(group) if partial else WARPGROUP_ROWS
    return used, WARPGROUP_ROWS, used


def num_threads(spec: Spec) -> int:
    """The number of Pallas threads, i.e. warpgroups: the computing ones and the copying one."""
    del spec
    return COMPUTING + 1


def shared_bytes(spec: Spec) -> int:
    """Bytes of the buffers, without barriers."""
    keys, values = spec.head_dim, 0 if spec.values_in_keys else spec.value_dim
    return 2 * (spec.rows * spec.head_dim + spec.stages * spec.keys * (keys + values))


def attend_tiles(refs: dict[str, Ref], spec: Spec) -> None:
    """Runs in every warpgroup of the block; `refs` holds the operands and results by name (see `gpu.launch`)."""
    tiled = tiled_rows(spec, 2)
    assert (spec.value_dim // COMPUTING) % (swizzle_of(2 * spec.head_dim) // 2) == 0, "refused before"
    kinds = ("k",) if spec.values_in_keys else ("k", "v")
    scratch: dict[str, Scratch] = {"q_buffer": plgpu.SMEM((WARPGROUP_ROWS, spec.head_dim), spec.dtype, transforms=tiled)}
    for kind in kinds:
        scratch |= {
            f"{kind}_buffer": plgpu.SMEM((spec.stages, spec.keys, spec.head_dim), spec.dtype, transforms=tiled),
            f"{kind}_full": plgpu.Barrier(num_arrivals=spec.copies, num_barriers=spec.stages),
            f"{kind}_free": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=spec.stages),
        }
    scratch |= {
        "q_full": plgpu.Barrier(),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTING),
        "turn": plgpu.Barrier(num_arrivals=COMPUTING),
        "scored": plgpu.Barrier(num_arrivals=COMPUTING),
    }

    def body(*allocated: Ref) -> None:
        _WideBlock(refs | dict(zip(scratch, allocated, strict=True)), spec, warpgroups=COMPUTING).run()

    pl.run_scoped(body, *scratch.values(), collective_axes="warpgroup")


class _WideBlock(Block):
    """The work of one thread block."""

    @property
    def columns(self) -> int:
        """Of the values and results of a warpgroup."""
        return self.spec.value_dim // COMPUTING

    # The copying warpgroup.

    def copy(self, tile: Tile, steps_before: jax.Array) -> None:
        """Fetches the queries of a tile, and the keys and values of all steps."""

        def step(i: jax.Array, _: None) -> None:
            n = steps_before + i
            blocks = blocks_of(tile, i, self.refs, self.spec)
            for kind in self.kinds:
                pl.when(n >= self.spec.stages)(lambda kind=kind: self.await_free(n, kind))
                self.fetch(tile, n, kind, blocks)
                if kind == "k":
                    pl.when(i == 0)(lambda: self.fetch_queries(tile, steps_before))

        lax.fori_loop(0, tile.num_steps, step, None)

    def fetch_queries(self, tile: Tile, steps_before: jax.Array) -> None:
        refs, rows = self.refs, self.spec.rows_in
        pl.when(steps_before > 0)(lambda: plgpu.barrier_wait(refs["q_free"]))
        # The other rows of a single tile are left unchanged.
        target = refs["q_buffer"] if rows == WARPGROUP_ROWS else refs["q_buffer"].at[pl.ds(0, rows)]
        source = refs["q"].at[tile.head, pl.ds(tile.columns[ROW] - tile.skipped, rows)]
        plgpu.copy_gmem_to_smem(source, target, refs["q_full"])

    def await_last_reads(self, num_steps: jax.Array) -> None:
        super().await_last_reads(num_steps)
        pl.when(num_steps > 0)(lambda: plgpu.barrier_wait(self.refs["q_free"]))

    # The computing warpgroups.

    def compute(self, tile: Tile, steps_before: jax.Array) -> None:
        spec = self.spec
        rows = Rows(tile, self.refs, spec, first=0, count=WARPGROUP_ROWS, layout=plgpu.Layout.WGMMA)
        state = (rows.full((WARPGROUP_ROWS, self.columns), 0.0), *rows.start())
        plgpu.barrier_wait(self.refs["q_full"])

        def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
            return self.wide_step(tile, rows, i, steps_before + i, state, masked=masked)

        acc, top, total = over_steps(tile, spec, step, state)
        self.store(tile, acc / rows.along_rows(total, acc.shape), top, total)

    def wide_step(
        self, tile: Tile, rows: Rows, i: jax.Array, n: jax.Array, state: tuple[jax.Array, ...], *, masked: bool
    ) -> tuple[jax.Array, ...]:
        """Step i of the tile, which is step n of the thread block."""
        spec, refs = self.spec, self.refs
        acc, top, total = state
        slot, num_keys = lax.rem(n, jnp.int32(spec.stages)), tile.end - tile.first - i * spec.keys
        plgpu.barrier_wait(refs["k_full"].at[slot])
        scores = self.product_with_keys(refs["q_buffer"], refs["k_buffer"].at[slot])
        pl.when(i == tile.num_steps - 1)(lambda: plgpu.barrier_arrive(refs["q_free"]))
        if not spec.values_in_keys:
            plgpu.barrier_arrive(refs["k_free"].at[slot])
        elif masked:
            pl.when(num_keys < spec.keys)(lambda: plgpu.barrier_arrive(refs["scored"]))
        weights, keep, top, total = rows.weigh(scores, i, top, total, masked=masked)
        acc = acc * rows.along_rows(keep, acc.shape)
        weights = weights.astype(spec.dtype)
        plgpu.barrier_arrive(refs["turn"])  # hand the tensor cores to the other warpgroup, then wait for it below
        if not spec.values_in_keys:
            plgpu.barrier_wait(refs["v_full"].at[slot])
        plgpu.barrier_wait(refs["turn"])
        values = refs[f"{self.kinds[-1]}_buffer"].at[slot, :, pl.ds(self.warpgroup * self.columns, self.columns)]
        if masked:
            pl.when(num_keys < spec.keys)(lambda: self.blank(rows, num_keys, slot))
        acc = self.add_product(acc, weights, values)
        plgpu.barrier_arrive(refs[f"{self.kinds[-1]}_free"].at[slot])
        return acc, top, total

    def blank(self, rows: Rows, num_keys: jax.Array, slot: jax.Array) -> None:
        """Zeroes this warpgroup's values after the last key: weights of zero times uninitialized memory may be NaN."""
        spec = self.spec
        if spec.values_in_keys:
            plgpu.barrier_wait(self.refs["scored"])  # the other warpgroup multiplies these columns with its queries
        for column in range(0, self.columns, _BLANKED_COLUMNS):
            columns = pl.ds(self.warpgroup * self.columns + column, _BLANKED_COLUMNS)
            values = self.refs[f"{self.kinds[-1]}_buffer"].at[slot, :, columns]
            exists = rows.iota((spec.keys, _BLANKED_COLUMNS), 0) < num_keys
            values[...] = jnp.where(exists, values[...], jnp.zeros((), spec.dtype))
        plgpu.commit_smem()

    def store(self, tile: Tile, result: jax.Array, top: jax.Array, total: jax.Array) -> None:
        """Stores a warpgroup's columns from its registers: the float32 results of a tile have no room in shared memory."""
        refs = self.refs
        out = refs["out"].at[tile.index, tile.head, :, pl.ds(self.warpgroup * self.columns, self.columns)]
        self.store_rows(out, result.astype(refs["out"].dtype))
        if self.spec.partial:
            lse = refs["lse"].at[tile.index, tile.head]
            pl.when(self.warpgroup == 0)(lambda: self.store_rows(lse, top + jnp.log2(total)))

    def store_rows(self, target: Ref, x: jax.Array) -> None:
        """The first rows of x [64, ...], as many as `target` has."""
        num_rows = self.spec.rows_out
        if self.spec.interpreted:
            target[...] = x[:num_rows]
        elif num_rows == WARPGROUP_ROWS:
            plgpu.store(target, x, optimized=False)
        else:
            layout = plgpu.Layout.WGMMA
            plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout if x.ndim == 2 else layout.reduce(1)))(
                functools.partial(_store_first, num_rows)
            )(target, x)


def _store_first(num_rows: int, _: object, target: ir.Value, x: Any) -> None:
    """Each thread stores the registers that belong to the first rows: Pallas has no name for it."""
    index = ir.IndexType.get()
    origin = next(iter(x.layout.thread_idxs(x.shape)))  # of a thread's first register

    def moved(offset: tuple[int, ...]) -> list[ir.Value]:
        return [arith.addi(at, arith.constant(index, by)) for at, by in zip(origin, offset, strict=True)]

    by_row: dict[int, list[tuple[tuple[int, ...], ir.Value]]] = {}
    for offset, numbers in zip(register_offsets(x.layout, x.shape), x.registers.flat, strict=True):
        by_row.setdefault(offset[0], []).append((offset, numbers))
    for registers in by_row.values():
        row = moved(registers[0][0])[0]
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, row, arith.constant(index, num_rows))):
            for offset, numbers in registers:
                vector.store(numbers, target, moved(offset), alignment=_bytes_of(numbers.type))


def _bytes_of(register: Any) -> int:
    """Of a thread's adjacent numbers, from a multiple of which they begin; unless told so, MLIR stores 4 bytes at a time."""
    return mgpu.bytewidth(register.element_type) * math.prod(register.shape)


def register_offsets(layout: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """How far each register of a thread is from its first one, along the axes of an array [64, ...]."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    of_tiles = layout.tiling.tile_strides(strides)[: len(layout.registers_shape(shape))]
    flat = [sum(i * by for i, by in zip(tile, of_tiles, strict=True)) for tile in np.ndindex(layout.registers_shape(shape))]
    return [tuple(n // by % size for by, size in zip(strides, shape, strict=True)) for n in flat]
