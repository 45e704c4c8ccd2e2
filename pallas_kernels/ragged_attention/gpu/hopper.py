"""The body of the attention kernel for Hopper: how one thread block processes its share of q tiles and KV heads.

A warpgroup handles 64 rows of a tile. One warpgroup copies (TMA) and the others compute (WGMMA), with a ring of buffers
between them that is not drained between tiles:

  copy      | K0 V0 | K1 V1 | K2 V2 | K0 V0 | ...       waits until the buffer to overwrite has been read
  compute   |       | K0 V0 | K1 V1 | K2 V2 | K0 ...    waits until the buffer is full
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pallas_types import Ref, Scratch
from pallas_kernels.ragged_attention.gpu.softmax_tile import (
    DEQUANTIZED_ROWS,
    GRANULE,
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

WARPGROUP_ROWS = 64  # rows of one WGMMA
# Registers per thread when two warpgroups compute and one copies (504 in total), for 16-bit and for 8-bit caches.
COMPUTE_REGISTERS, COPY_REGISTERS = (232, 208), (40, 88)


def tile_rows(group: int, head_dim: int, *, partial: bool) -> tuple[int, int, int]:
    """The numbers of rows of a tile that are read, computed and stored, for every D."""
    if partial and (of_query := rows_of_query(group)) <= WARPGROUP_ROWS:
        return of_query, WARPGROUP_ROWS, of_query
    return 2 * WARPGROUP_ROWS, 2 * WARPGROUP_ROWS, 2 * WARPGROUP_ROWS


def num_threads(spec: Spec) -> int:
    """The number of Pallas threads, i.e. warpgroups: the computing ones and the copying one."""
    return _warpgroups(spec) + 1


def _warpgroups(spec: Spec) -> int:
    return spec.rows // WARPGROUP_ROWS


STAGED = 2  # 8-bit steps in shared memory that have not been dequantized yet


def tiled_rows(spec: Spec, itemsize: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The shared-memory layout of rows [D], with the widest swizzle that divides a row."""
    swizzle = swizzle_of(itemsize * spec.head_dim)
    return plgpu.TilingTransform((GRANULE, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def swizzle_of(row_bytes: int) -> int:
    """The widest swizzle that divides a row."""
    return next(width for width in (128, 64, 32) if row_bytes % width == 0)


def shared_bytes(spec: Spec) -> int:
    """Bytes of the buffers, without barriers and the compiler's own scratch memory."""
    results = 4 * spec.rows * (spec.head_dim + 1) if spec.partial else 0
    staged = 2 * STAGED * spec.keys * (spec.head_dim + 4) if spec.quantized else 0
    return 2 * spec.head_dim * (spec.rows + 2 * spec.stages * spec.keys) + results + staged


def attend_tiles(refs: dict[str, Ref], spec: Spec) -> None:
    """Runs in every warpgroup of the block; `refs` holds the operands and results by name (see `gpu.launch`)."""
    tiled, warpgroups = tiled_rows(spec, 2), _warpgroups(spec)
    q_shape = (warpgroups, WARPGROUP_ROWS, spec.head_dim)
    ring = (spec.stages, spec.keys, spec.head_dim)
    arrivals = 1 if spec.quantized else spec.copies  # the dequantizing warpgroup arrives once, or each copy does
    scratch: dict[str, Scratch] = {
        "q_buffer": plgpu.SMEM(q_shape, spec.dtype, transforms=tiled),
        "k_buffer": plgpu.SMEM(ring, spec.dtype, transforms=tiled),
        "v_buffer": plgpu.SMEM(ring, spec.dtype, transforms=tiled),
        "q_full": plgpu.Barrier(num_barriers=warpgroups),
        "k_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=spec.stages),
        "v_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=spec.stages),
        "k_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=spec.stages),
        "v_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=spec.stages),
    }
    if spec.quantized:
        for kind in ("k", "v"):
            values = plgpu.SMEM((STAGED, *ring[1:]), spec.cache_dtype, transforms=tiled_rows(spec, 1))
            scratch |= {f"{kind}_staged": values, f"{kind}_factors": plgpu.SMEM((STAGED, spec.keys), jnp.float32)}
        scratch["staged"] = plgpu.Barrier(num_arrivals=4 * spec.copies, num_barriers=STAGED)
    if warpgroups > 1:
        scratch["turn"] = plgpu.Barrier(num_arrivals=warpgroups)
    if spec.partial:
        scratch |= {
            "out_buffer": plgpu.SMEM(q_shape, jnp.float32, transforms=tiled_rows(spec, 4)),
            "lse_buffer": plgpu.SMEM((warpgroups, WARPGROUP_ROWS), jnp.float32),
        }

    def body(*allocated: Ref) -> None:
        Block(refs | dict(zip(scratch, allocated, strict=True)), spec, warpgroups=warpgroups).run()

    pl.run_scoped(body, *scratch.values(), collective_axes="warpgroup")


class Block:
    """The work of one thread block."""

    def __init__(self, refs: dict[str, Ref], spec: Spec, *, warpgroups: int) -> None:
        self.refs, self.spec = refs, spec
        self.warpgroup, self.warpgroups = lax.axis_index("warpgroup"), warpgroups
        self.kinds = ("k",) if spec.values_in_keys else ("k", "v")

    def run(self) -> None:
        @pl.when(self.warpgroup < self.warpgroups)
        def _() -> None:
            if self.warpgroups > 1:
                plgpu.set_max_registers(COMPUTE_REGISTERS[self.spec.quantized], action="increase")
                pl.when(self.warpgroup == 1)(self.take_turn)
            for_each_tile(self.refs, self.spec, self.compute)
            if self.warpgroups > 1:
                pl.when(self.warpgroup == 0)(self.take_turn)

        @pl.when(self.warpgroup == self.warpgroups)
        def _() -> None:
            if self.warpgroups > 1:
                plgpu.set_max_registers(COPY_REGISTERS[self.spec.quantized], action="decrease")
            num_steps = for_each_tile(self.refs, self.spec, self.copy)
            if self.spec.quantized:
                pl.when(num_steps > 0)(lambda: self.dequantize(num_steps - 1))
            self.await_last_reads(num_steps)

    # The copying warpgroup. Steps are counted over all tiles of the block: step n uses buffer n % stages.

    def await_free(self, n: jax.Array, kind: str) -> None:
        plgpu.barrier_wait(self.refs[f"{kind}_free"].at[lax.rem(n, jnp.int32(self.spec.stages))])

    def copy(self, tile: Tile, steps_before: jax.Array) -> None:
        """Fetches the keys and values of all steps."""

        def step(i: jax.Array, _: None) -> None:
            n = steps_before + i
            blocks = blocks_of(tile, i, self.refs, self.spec)
            if self.spec.quantized:
                self.stage(tile, n, blocks)
                pl.when(n > 0)(lambda: self.dequantize(n - 1))
                return
            for kind in self.kinds:
                pl.when(n >= self.spec.stages)(lambda kind=kind: self.await_free(n, kind))
                self.fetch(tile, n, kind, blocks)

        lax.fori_loop(0, tile.num_steps, step, None)

    def await_last_reads(self, num_steps: jax.Array) -> None:
        def step(n: jax.Array, _: None) -> None:
            for kind in self.kinds:
                self.await_free(n, kind)

        lax.fori_loop(jnp.maximum(num_steps - self.spec.stages, 0), num_steps, step, None)

    def fetch(self, tile: Tile, n: jax.Array, kind: str, blocks: list[tuple[jax.Array, jax.Array | int]]) -> None:
        slot = lax.rem(n, jnp.int32(self.spec.stages))
        rows = min(self.spec.keys, self.spec.block_size)
        for j, (block, offset) in enumerate(blocks):
            cache, buffer = self.refs[f"{kind}_cache"], self.refs[f"{kind}_buffer"]
            columns = [pl.ds(0, buffer.shape[-1])] if buffer.shape[-1] < cache.shape[-1] else []
            plgpu.copy_gmem_to_smem(
                cache.at[block, tile.kv_head, pl.ds(offset, rows), *columns],
                buffer.at[slot, pl.ds(j * rows, rows)],
                self.refs[f"{kind}_full"].at[slot],
            )

    def stage(self, tile: Tile, n: jax.Array, blocks: list[tuple[jax.Array, jax.Array | int]]) -> None:
        """Starts copying the 8-bit keys and values of step n, into the buffer from which step n - 2 was dequantized."""
        refs, slot = self.refs, lax.rem(n, jnp.int32(STAGED))
        rows = min(self.spec.keys, self.spec.block_size)
        for j, (block, offset) in enumerate(blocks):
            for kind in ("k", "v"):
                for source, target in (("cache", "staged"), ("scales", "factors")):
                    plgpu.copy_gmem_to_smem(
                        refs[f"{kind}_{source}"].at[block, tile.kv_head, pl.ds(offset, rows)],
                        refs[f"{kind}_{target}"].at[slot, pl.ds(j * rows, rows)],
                        refs["staged"].at[slot],
                    )

    def dequantize(self, n: jax.Array) -> None:
        """Fills the buffers of step n while the copies of the next step are in flight."""
        spec, refs = self.spec, self.refs
        staged, slot = lax.rem(n, jnp.int32(STAGED)), lax.rem(n, jnp.int32(spec.stages))
        by_way_of = jnp.bfloat16 if spec.cache_dtype == jnp.int8 else jnp.float16
        plgpu.barrier_wait(refs["staged"].at[staged])
        for kind in ("k", "v"):
            pl.when(n >= spec.stages)(lambda kind=kind: self.await_free(n, kind))
            for part in range(0, spec.keys, DEQUANTIZED_ROWS):
                rows = pl.ds(part, DEQUANTIZED_ROWS)
                dequantize(
                    refs[f"{kind}_staged"].at[staged, rows],
                    refs[f"{kind}_factors"].at[staged, rows],
                    refs[f"{kind}_buffer"].at[slot, rows],
                    spec,
                    by_way_of=by_way_of,
                )
            plgpu.commit_smem()  # before WGMMA reads the result, and before the next copy overwrites its source
            plgpu.barrier_arrive(refs[f"{kind}_full"].at[slot])

    # The computing warpgroups.

    def compute(self, tile: Tile, steps_before: jax.Array) -> None:
        spec, refs, warpgroup = self.spec, self.refs, self.warpgroup
        first = warpgroup * WARPGROUP_ROWS
        q_buffer, q_full = refs["q_buffer"].at[warpgroup], refs["q_full"].at[warpgroup]
        granule, num_rows = tile.columns[ROW] - tile.skipped, min(spec.rows_in, WARPGROUP_ROWS)
        source = refs["q"].at[tile.head, pl.ds(granule + first, num_rows)]
        # Of a single tile the other rows are left unchanged.
        target = q_buffer if num_rows == WARPGROUP_ROWS else q_buffer.at[pl.ds(0, num_rows)]
        plgpu.copy_gmem_to_smem(source, target, q_full)

        rows = Rows(tile, refs, spec, first=first, count=WARPGROUP_ROWS, layout=plgpu.Layout.WGMMA)
        state = (rows.full((WARPGROUP_ROWS, spec.head_dim), 0.0), *rows.start())
        plgpu.barrier_wait(q_full)

        def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
            return self.step(tile, rows, i, steps_before, state, q_buffer=q_buffer, masked=masked)

        acc, top, total = over_steps(tile, spec, step, state)
        self.store(tile, acc / rows.along_rows(total, acc.shape), top, total)

    def step(
        self,
        tile: Tile,
        rows: Rows,
        i: jax.Array,
        steps_before: jax.Array,
        state: tuple[jax.Array, ...],
        *,
        q_buffer: Ref,
        masked: bool,
    ) -> tuple[jax.Array, ...]:
        spec, refs = self.spec, self.refs
        acc, top, total = state
        slot = lax.rem(steps_before + i, jnp.int32(spec.stages))
        plgpu.barrier_wait(refs["k_full"].at[slot])
        scores = self.product_with_keys(q_buffer, refs["k_buffer"].at[slot])
        plgpu.barrier_arrive(refs["k_free"].at[slot])
        weights, keep, top, total = rows.weigh(scores, i, top, total, masked=masked)
        acc = acc * rows.along_rows(keep, acc.shape)
        weights = weights.astype(spec.dtype)
        if self.warpgroups > 1:
            plgpu.barrier_arrive(refs["turn"])  # hand the tensor cores to the other warpgroup, then wait for it below
        plgpu.barrier_wait(refs["v_full"].at[slot])
        if self.warpgroups > 1:
            plgpu.barrier_wait(refs["turn"])
        if masked:
            self.blank_unseen_values(rows, tile.end - tile.first - i * spec.keys, slot)
        acc = self.add_product(acc, weights, refs["v_buffer"].at[slot])
        plgpu.barrier_arrive(refs["v_free"].at[slot])
        return acc, top, total

    def take_turn(self) -> None:
        """Two warpgroups alternate: one computes weights while the other keeps the tensor cores busy."""
        if self.warpgroups > 1:
            plgpu.barrier_arrive(self.refs["turn"])
            plgpu.barrier_wait(self.refs["turn"])

    def blank_unseen_values(self, rows: Rows, num_keys: jax.Array, slot: jax.Array) -> None:
        """Zeroes the values after the last key: weights of zero times uninitialized memory may be NaN.

        Warpgroup 0 does this for both, because it multiplies before warpgroup 1 gets its turn.
        """
        spec = self.spec

        @pl.when((num_keys < spec.keys) & (self.warpgroup == 0))
        def _() -> None:
            for part in range(0, spec.keys, WARPGROUP_ROWS):
                values = self.refs["v_buffer"].at[slot, pl.ds(part, WARPGROUP_ROWS)]
                exists = rows.iota((WARPGROUP_ROWS, spec.head_dim), 0) < num_keys - part
                values[...] = jnp.where(exists, values[...], jnp.zeros((), spec.dtype))
            plgpu.commit_smem()

    def store(self, tile: Tile, result: jax.Array, top: jax.Array, total: jax.Array) -> None:
        spec, refs, warpgroup = self.spec, self.refs, self.warpgroup
        buffer = refs["out_buffer" if spec.partial else "q_buffer"].at[warpgroup]
        buffer[...] = result.astype(buffer.dtype)
        rows = min(WARPGROUP_ROWS, spec.rows_out)
        target = pl.ds(warpgroup * WARPGROUP_ROWS, rows) if self.warpgroups > 1 else pl.ds(0, rows)
        if spec.partial:
            lse = refs["lse_buffer"].at[warpgroup]
            lse[...] = top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse.at[pl.ds(0, rows)], refs["lse"].at[tile.index, tile.head, target])
        else:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, rows)], refs["out"].at[tile.index, tile.head, target])
        plgpu.wait_smem_to_gmem(0)

    # Operations for which the interpreter needs a substitute.

    def product_with_keys(self, queries: Ref, keys: Ref) -> jax.Array:
        """queries @ keys.T; this warpgroup's turn ends when all of it has been issued to the tensor cores."""
        if self.spec.interpreted:  # the interpreter cannot transpose an operand
            self.take_turn()
            scores = lax.dot_general(queries[...], keys[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # WGMMA needs no fence here, but the race detector requires one for plain reads
            return scores

        def multiply(scores: Ref) -> jax.Array:
            plgpu.wgmma(scores, queries, plgpu.transpose_ref(keys, (1, 0)))
            self.take_turn()
            return scores[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((queries.shape[0], keys.shape[0]), jnp.float32))

    def add_product(self, acc: jax.Array, weights: jax.Array, values: Ref) -> jax.Array:
        """acc + weights @ values, the weights from registers."""
        if self.spec.interpreted:  # the interpreter supports neither initialized accumulators nor operands in registers
            acc = acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return acc
        accumulator: Ref = plgpu.WGMMAAccumulatorRef.init(acc)
        result: jax.Array = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(accumulator)
        return result
