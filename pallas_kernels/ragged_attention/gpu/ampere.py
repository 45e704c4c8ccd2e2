"""The body of the attention kernel for Ampere and Ada Lovelace: how one thread block processes its share of the tiles.

A thread block is one warpgroup of four warps. Several blocks share a multiprocessor and hide each other's latency. A block
copies (cp.async) the keys and values of the next step before it computes (mma) on those of the current one. Operands of
products are in registers; each warp loads the part that it needs from shared memory:

  64 or 128 rows    a warp owns 16 or 32 rows and reads all keys; its weights are in registers in the layout that the left
                    operand of the second product requires
  16 or 32 rows     several warps share the same rows: each multiplies them by some of the keys, writes its scores to shared
                    memory, reads the scores of all keys, and multiplies the weights by some of the columns of the values.
                    Keys and values, whose loads limit single queries, are read once instead of by every warp

Heads wider than 256 numbers have tiles of 16 or 32 rows only, since a warp has registers for 256 columns of 16 rows. With
latents, values are read from the buffer of their keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

from pallas_kernels.pallas_types import Layout, Ref, Scratch
from pallas_kernels.ragged_attention.gpu.softmax_tile import (
    DEQUANTIZED_ROWS,
    ROW,
    Rows,
    Spec,
    Tile,
    blocks_of,
    dequantize,
    for_each_tile,
    over_steps,
    rows_of_query,
)
from pallas_kernels.ragged_attention.gpu.support import AMPERE_SHORT, MAX_HEAD_DIM, copied_bytes

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of its functions
MMA_ROWS, MMA_KEYS = 16, 16  # of the left operand
QUERY_ROWS = 32  # the minimum for a copy by four warps, for every D


def tile_rows(group: int, head_dim: int, *, partial: bool) -> tuple[int, int, int]:
    """The numbers of rows of a tile that are read, computed and stored."""
    if partial:
        # Four warps divide D among them in units of 8 columns, two warps in units of 16.
        fewest = 16 if head_dim % 32 == 0 else 32
        rows = next(rows for rows in (16, 32, 64, 128) if rows >= max(rows_of_query(group), fewest))
        return max(rows, QUERY_ROWS), rows, rows
    rows = QUERY_ROWS if head_dim > MAX_HEAD_DIM else 64 if group <= AMPERE_SHORT else 128
    return rows, rows, rows


def num_threads(spec: Spec) -> int:
    """The number of Pallas threads, i.e. warpgroups."""
    return 1


def shared_bytes(spec: Spec) -> int:
    """Bytes of the buffers, without the compiler's own scratch memory."""
    exchange = 4 * spec.rows * spec.keys if _shares_rows(spec) else 0
    operands = 2 * 2 * spec.keys * spec.head_dim if spec.quantized else 0
    kinds = 1 if spec.values_in_keys else 2
    buffers = kinds * spec.stages * spec.keys * spec.head_dim * jnp.dtype(spec.cache_dtype).itemsize
    return 2 * spec.head_dim * spec.rows_in + buffers + operands + exchange


def _shares_rows(spec: Spec) -> bool:
    """Whether several warps share the same rows."""
    return spec.rows < 4 * MMA_ROWS


def attend_tiles(refs: dict[str, Ref], spec: Spec) -> None:
    """Runs in the warpgroup of the block; `refs` holds the operands and results by name (see `gpu.launch`)."""
    copied = min(spec.keys, spec.block_size)

    def tiled(dtype: DTypeLike) -> tuple[Any, Any]:
        size = jnp.dtype(dtype).itemsize
        width = copied_bytes(copied, spec.head_dim, size)
        assert width is not None  # support.py refuses it
        return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)

    def buffer(*shape: int, dtype: DTypeLike) -> Scratch:
        return plgpu.SMEM(shape, dtype, transforms=tiled(dtype))

    scratch: dict[str, Scratch] = {"q_buffer": buffer(spec.rows_in, spec.head_dim, dtype=spec.dtype)}
    kinds = ("k",) if spec.values_in_keys else ("k", "v")
    for kind in kinds:
        scratch[f"{kind}_buffer"] = buffer(spec.stages, spec.keys, spec.head_dim, dtype=spec.cache_dtype)
        if spec.quantized:
            scratch[f"{kind}_operand"] = buffer(spec.keys, spec.head_dim, dtype=spec.dtype)
    if _shares_rows(spec):
        by_float = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
        scratch["scores"] = plgpu.SMEM((spec.rows, spec.keys), jnp.float32, transforms=by_float)
    if spec.interpreted:  # the interpreter has no cp.async, so each step has a barrier instead
        scratch["q_full"] = plgpu.Barrier()
        scratch["full"] = plgpu.Barrier(num_arrivals=len(kinds) * spec.copies, num_barriers=spec.stages)

    def body(*allocated: Ref) -> None:
        block = _Block(refs | dict(zip(scratch, allocated, strict=True)), spec, columns=tiled(spec.dtype)[0].tiling[1])
        for_each_tile(refs, spec, block.compute)

    pl.run_scoped(body, *scratch.values(), collective_axes="warpgroup")


class _Block:
    """The work of one thread block."""

    def __init__(self, refs: dict[str, Ref], spec: Spec, *, columns: int) -> None:
        self.refs, self.spec = refs, spec
        self.kinds = ("k",) if spec.values_in_keys else ("k", "v")
        self.columns = columns  # columns of D that are contiguous in shared memory
        self.left: Layout = None
        self.right: Layout = None
        self.result: Layout = None
        if not spec.interpreted:
            layouts, warps = plgpu.Layout, min(4, spec.rows // MMA_ROWS)
            self.left, self.right, self.result = (
                layout(spec.dtype, m_warps=warps) for layout in (layouts.MMA_LHS, layouts.MMA_RHS, layouts.MMA_ACC)
            )

    def compute(self, tile: Tile, steps_before: jax.Array) -> None:
        spec, refs = self.spec, self.refs
        source = refs["q"].at[tile.head, pl.ds(tile.columns[ROW] - tile.skipped, spec.rows_in)]
        self.copy(source, refs["q_buffer"], "q_full")
        for ahead in range(spec.stages - 1):
            pl.when(ahead < tile.num_steps)(lambda ahead=ahead: self.fetch(tile, jnp.int32(ahead), steps_before))
        if spec.interpreted:
            plgpu.barrier_wait(refs["q_full"])

        rows = Rows(tile, refs, spec, first=0, count=spec.rows, layout=self.left if _shares_rows(spec) else self.result)
        state = (self.zeros((spec.rows, spec.value_dim)), *rows.start())

        def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
            return self.step(tile, rows, i, steps_before, state, masked=masked)

        acc, top, total = over_steps(tile, spec, step, state)
        result = acc / self.along_rows(total, acc.shape)
        self.store(refs["out"].at[tile.index, tile.head], result.astype(refs["out"].dtype))
        if spec.partial:
            self.store(refs["lse"].at[tile.index, tile.head], top + jnp.log2(total))

    def step(
        self, tile: Tile, rows: Rows, i: jax.Array, steps_before: jax.Array, state: tuple[jax.Array, ...], *, masked: bool
    ) -> tuple[jax.Array, ...]:
        spec = self.spec
        acc, top, total = state
        slot = lax.rem(steps_before + i, jnp.int32(spec.stages))
        ahead = i + (spec.stages - 1)
        pl.when(ahead < tile.num_steps)(lambda: self.fetch(tile, ahead, steps_before))
        self.await_step(slot, is_followed=ahead < tile.num_steps)
        keys, *values = (self.operand(kind, tile, i, slot) for kind in self.kinds)
        values = values[0] if values else keys.at[:, pl.ds(0, spec.value_dim)]
        scores = self.product_with_keys(keys)
        weights, keep, top, total = rows.weigh(scores, i, top, total, masked=masked)
        num_keys = tile.end - tile.first - i * spec.keys if masked else None
        acc = self.add_product(acc * self.along_rows(keep, acc.shape), weights.astype(spec.dtype), values, num_keys)
        if spec.interpreted:
            plgpu.commit_smem()  # the interpreter copies by TMA, which needs a fence after plain reads; cp.async does not
        return acc, top, total

    # Copies. Each copy is a separate cp.async group, and groups complete in the order in which they were issued.

    def fetch(self, tile: Tile, i: jax.Array, steps_before: jax.Array) -> None:
        """Starts copying the keys and values of the tile's step i, into a buffer that was last read in step i - stages."""
        spec, refs = self.spec, self.refs
        slot = lax.rem(steps_before + i, jnp.int32(spec.stages))
        rows = min(spec.keys, spec.block_size)
        for j, (block, offset) in enumerate(blocks_of(tile, i, refs, spec)):
            for kind in self.kinds:
                cache = refs[f"{kind}_cache"]
                columns = [pl.ds(0, spec.head_dim)] if spec.head_dim < cache.shape[-1] else []
                source = cache.at[block, tile.kv_head, pl.ds(offset, rows), *columns]
                self.copy(source, refs[f"{kind}_buffer"].at[slot, pl.ds(j * rows, rows)], "full", slot)

    def copy(self, source: Ref, target: Ref, barrier: str, slot: jax.Array | None = None) -> None:
        if self.spec.interpreted:
            full = self.refs[barrier] if slot is None else self.refs[barrier].at[slot]
            plgpu.copy_gmem_to_smem(source, target, full)
        else:
            plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def await_step(self, slot: jax.Array, *, is_followed: jax.Array) -> None:
        """Waits for the keys and values in a buffer, and for q. Copies of later steps may still be in flight."""
        if self.spec.interpreted:
            plgpu.barrier_wait(self.refs["full"].at[slot])
            return
        # With two stages this is exact; with more, the last steps of a tile also wait for later steps' copies.
        following = len(self.kinds) * self.spec.copies * (self.spec.stages - 1)
        lax.cond(is_followed, lambda: plgpu.wait_gmem_to_smem(following), lambda: plgpu.wait_gmem_to_smem(0))

    def operand(self, kind: str, tile: Tile, i: jax.Array, slot: jax.Array) -> Ref:
        """The keys or values of the tile's step i, dequantized if they have 8 bits."""
        spec, refs = self.spec, self.refs
        numbers = refs[f"{kind}_buffer"].at[slot]
        if not spec.quantized:
            return numbers
        ((block, offset),) = blocks_of(tile, i, refs, spec)  # all keys of a step are in one block
        for part in range(0, spec.keys, DEQUANTIZED_ROWS):
            rows = pl.ds(part, DEQUANTIZED_ROWS)
            scales = refs[f"{kind}_scales"].at[block, tile.kv_head, pl.ds(offset + part, DEQUANTIZED_ROWS)]
            dequantize(numbers.at[rows], scales, refs[f"{kind}_operand"].at[rows], spec, by_way_of=jnp.float32)
        return refs[f"{kind}_operand"]

    # Products.

    def zeros(self, shape: tuple[int, ...]) -> jax.Array:
        return self.as_result(jnp.zeros(shape, jnp.float32))

    def along_rows(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.as_result(lax.broadcast_in_dim(x, shape, [0]))

    def as_result(self, x: jax.Array) -> jax.Array:
        return x if self.spec.interpreted else plgpu.layout_cast(x, self.result)

    def product_with_keys(self, keys: Ref) -> jax.Array:
        """queries @ keys.T, f32[rows, keys]."""
        spec, queries = self.spec, self.refs["q_buffer"]
        if spec.interpreted:
            queries = queries[pl.ds(0, spec.rows)]
            scores = lax.dot_general(queries, keys[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        else:
            scores = self.zeros((spec.rows, spec.keys))
            for column in range(0, spec.head_dim, self.columns):
                some = pl.ds(column, self.columns)
                left = plgpu.load(queries.at[pl.ds(0, spec.rows), some], layout=self.left)
                right = plgpu.load(keys.at[:, some].transpose((1, 0)), layout=self.right)
                scores = plgpu.mma(scores, left, right)
        if not _shares_rows(spec):
            return scores
        self.store(self.refs["scores"], scores)
        # Not optimized: two lanes access the same bank, as they did in the store.
        return self.load(self.refs["scores"], self.left, optimized=False)

    def add_product(self, acc: jax.Array, weights: jax.Array, values: Ref, num_keys: jax.Array | None) -> jax.Array:
        """acc + weights @ values. Values after the first `num_keys` may be NaN."""
        spec = self.spec
        if not (spec.interpreted or _shares_rows(spec)):
            weights = self.as_left(weights)
        for key in range(0, spec.keys, MMA_KEYS):
            right = values.at[pl.ds(key, MMA_KEYS)]
            right = self.load(right, self.right)
            if num_keys is not None:
                number = lax.broadcasted_iota(jnp.int32, right.shape, 0)
                number = number if spec.interpreted else plgpu.layout_cast(number, self.right)
                right = jnp.where(number < num_keys - key, right, jnp.zeros((), spec.dtype))
            left = weights[:, key : key + MMA_KEYS]
            if spec.interpreted:
                acc = acc + jnp.dot(left, right, preferred_element_type=jnp.float32)
            else:
                acc = plgpu.mma(acc, left, right)
        return acc

    def as_left(self, weights: jax.Array) -> jax.Array:
        """The result of a product as the left operand of the next: each thread holds the same numbers in the same order."""
        dtype, layout = self.spec.dtype, self.left
        kind = plgpu.ShapeDtypeStruct(weights.shape, dtype, layout=layout)

        @plgpu.inline_mgpu(arg_types=(self.result,), return_type=kind)
        def relabel(_: object, x: Any) -> mgpu.FragmentedArray:
            registers = x.registers.reshape(layout.to_mgpu().registers_shape(x.shape))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

        return relabel(weights)

    def load(self, source: Ref, layout: Layout, *, optimized: bool = True) -> jax.Array:
        return source[...] if self.spec.interpreted else plgpu.load(source, layout=layout, optimized=optimized)

    def store(self, target: Ref, value: jax.Array) -> None:
        if self.spec.interpreted:
            target[...] = value
        else:
            plgpu.store(target, value, optimized=False)
