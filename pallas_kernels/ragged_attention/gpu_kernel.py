"""The body of the GPU attention kernel: what one thread block does with its share of q tiles and KV heads.

A q tile is up to 64 rows a warpgroup; a row is one query of one head, and the G heads that share a KV head lie side by
side, so that keys and values are fetched once for all of them. Both kinds of tile run the same body:

  chunk tiles    Q consecutive queries of one sequence, Q * G rows; normalised results
  single tiles   one query, G rows, and a piece of its keys; partial results, to be combined by their log-sum-exp

One warpgroup copies (TMA), the others compute (WGMMA), with a ring of buffers between them that is never drained at the
border from one tile to the next:

  copy      | K0 V0 | K1 V1 | K2 V2 | K0 V0 | ...       waits until the buffer that it overwrites was read
  compute   |       | K0 V0 | K1 V1 | K2 V2 | K0 ...    waits until the buffer is full
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP_ROWS = 64  # rows of one WGMMA
GRANULE = 8  # rows: where TMA reads a matrix that is tiled in shared memory, it begins at a multiple of this
LOG2E = math.log2(math.e)
# Finite, so that a row that has seen no key yet gives weights of exp2(-inf) = 0, not NaN.
NO_KEY = -1e30

# Columns of the work list, i32[tiles + 1, NUM_COLUMNS]; the last row holds the number of tiles that have work.
SEQUENCE, ROW, POSITION, FIRST, END, WINDOW, FIRST_BLOCK, HAS_SINK = range(8)
NUM_COLUMNS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What is static in a kernel."""

    group: int  # G
    head_dim: int  # D
    block_size: int  # B, a power of two
    warpgroups: int  # that compute; each has 64 rows of the tile
    keys: int  # keys of a step, a multiple of 64 and a power of two
    stages: int  # steps whose keys and values are in shared memory at once
    blocks: int  # thread blocks that share the tiles
    scale: float
    soft_cap: float | None
    has_window: bool
    partial: bool  # float32 results and their log-sum-exp, of the first `rows_out` rows
    dtype: Any  # of q and the caches
    interpreted: bool  # runs in Pallas' interpreter, which lacks some constructs

    @property
    def rows(self) -> int:
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def rows_out(self) -> int:
        """Rows of a tile that are stored: all of a chunk tile, of a single tile those that hold a head."""
        return -(-self.group // GRANULE) * GRANULE if self.partial and self.warpgroups == 1 else self.rows

    @property
    def queries(self) -> int:
        """Queries of a chunk tile. It begins at a granule, so that rows of the query before may come first."""
        return (self.rows - (GRANULE - 1 if self.group % GRANULE else 0)) // self.group

    def tiled(self, itemsize: int) -> tuple[Any, Any]:
        """The layout in shared memory of rows [D]: the widest pattern of bytes that divides one."""
        swizzle = next(width for width in (128, 64, 32) if (itemsize * self.head_dim) % width == 0)
        return plgpu.TilingTransform((GRANULE, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)

    @property
    def shared_bytes(self) -> int:
        """Of the buffers; barriers and the compiler's scratch come on top."""
        results = 4 * self.rows * (self.head_dim + 1) if self.partial else 0
        return 2 * self.head_dim * (self.rows + 2 * self.stages * self.keys) + results


def attend_tiles(refs: dict[str, Any], spec: Spec) -> None:
    """Runs in every warpgroup of the block; `refs` holds the operands and results by name (see `gpu.launch`)."""
    tiled = spec.tiled(2)
    q_shape = (spec.warpgroups, WARPGROUP_ROWS, spec.head_dim)
    ring = (spec.stages, spec.keys, spec.head_dim)
    copies = max(1, spec.keys // spec.block_size)
    scratch: dict[str, Any] = {
        "q_buffer": plgpu.SMEM(q_shape, spec.dtype, transforms=tiled),
        "k_buffer": plgpu.SMEM(ring, spec.dtype, transforms=tiled),
        "v_buffer": plgpu.SMEM(ring, spec.dtype, transforms=tiled),
        "q_full": plgpu.Barrier(num_barriers=spec.warpgroups),
        "k_full": plgpu.Barrier(num_arrivals=copies, num_barriers=spec.stages),
        "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=spec.stages),
        "k_free": plgpu.Barrier(num_arrivals=spec.warpgroups, num_barriers=spec.stages),
        "v_free": plgpu.Barrier(num_arrivals=spec.warpgroups, num_barriers=spec.stages),
    }
    if spec.warpgroups > 1:
        scratch["turn"] = plgpu.Barrier(num_arrivals=spec.warpgroups)
    if spec.partial:
        scratch |= {
            "out_buffer": plgpu.SMEM(q_shape, jnp.float32, transforms=spec.tiled(4)),
            "lse_buffer": plgpu.SMEM((spec.warpgroups, WARPGROUP_ROWS), jnp.float32),
        }

    def body(*allocated: Any) -> None:
        _Block(refs | dict(zip(scratch, allocated, strict=True)), spec).run()

    pl.run_scoped(body, *scratch.values(), collective_axes="warpgroup")


class _Tile:
    """A tile and a head: what the work list says of it."""

    def __init__(self, refs: dict[str, Any], spec: Spec, ordinal: jax.Array) -> None:
        num_kv_heads = refs["k_cache"].shape[1]
        # The heads of a tile, whose keys lie side by side, are worked on at the same time.
        self.index = lax.div(ordinal, jnp.int32(num_kv_heads))
        self.head = ordinal - self.index * num_kv_heads
        self.columns = [refs["work"][self.index, column] for column in range(NUM_COLUMNS)]
        self.first, self.end = self.columns[FIRST], self.columns[END]
        self.num_steps = lax.div(self.end - self.first + (spec.keys - 1), jnp.int32(spec.keys))


class _Block:
    """The work of one thread block: every `blocks`-th pair of a tile and a head."""

    def __init__(self, refs: dict[str, Any], spec: Spec) -> None:
        self.refs, self.spec = refs, spec
        self.warpgroup = lax.axis_index("warpgroup")

    def run(self) -> None:
        spec = self.spec

        @pl.when(self.warpgroup < spec.warpgroups)
        def _() -> None:
            if spec.warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
                pl.when(self.warpgroup == 1)(self.take_turn)
            self.for_each_tile(self.compute)
            if spec.warpgroups > 1:
                pl.when(self.warpgroup == 0)(self.take_turn)

        @pl.when(self.warpgroup == spec.warpgroups)
        def _() -> None:
            if spec.warpgroups > 1:
                plgpu.set_max_registers(40, action="decrease")
            self.await_last_reads(self.for_each_tile(self.copy))

    def for_each_tile(self, work: Callable[[_Tile, jax.Array], None]) -> jax.Array:
        """Calls `work` with every tile of this block and the number of steps before it; returns that of all."""
        block, blocks = lax.axis_index("block"), self.spec.blocks
        num_tiles = self.refs["work"][self.refs["work"].shape[0] - 1, 0]
        num_pairs = num_tiles * self.refs["k_cache"].shape[1]

        def tile(i: jax.Array, steps_before: jax.Array) -> jax.Array:
            tile = _Tile(self.refs, self.spec, block + i * blocks)
            work(tile, steps_before)
            return steps_before + tile.num_steps

        mine = lax.div(num_pairs - block + (blocks - 1), jnp.int32(blocks))
        return lax.fori_loop(0, mine, tile, jnp.int32(0))

    # The warpgroup that copies. Steps are counted over all tiles of the block: step n uses buffer n % stages.

    def await_free(self, n: jax.Array, kind: str) -> None:
        plgpu.barrier_wait(self.refs[f"{kind}_free"].at[lax.rem(n, jnp.int32(self.spec.stages))])

    def copy(self, tile: _Tile, steps_before: jax.Array) -> None:
        """Fetches the keys and values of all steps."""

        def step(i: jax.Array, _: None) -> None:
            n = steps_before + i
            blocks = self.blocks_of(tile, i)
            for kind in ("k", "v"):
                pl.when(n >= self.spec.stages)(lambda kind=kind: self.await_free(n, kind))
                self.fetch(tile, n, kind, blocks)

        lax.fori_loop(0, tile.num_steps, step, None)

    def await_last_reads(self, num_steps: jax.Array) -> None:
        def step(n: jax.Array, _: None) -> None:
            self.await_free(n, "k")
            self.await_free(n, "v")

        lax.fori_loop(jnp.maximum(num_steps - self.spec.stages, 0), num_steps, step, None)

    def blocks_of(self, tile: _Tile, i: jax.Array) -> list[tuple[jax.Array, Any]]:
        """The blocks of the pool, and the first key in them, that hold the keys of the tile's step i."""
        spec = self.spec
        sequence, base = tile.columns[SEQUENCE], tile.columns[FIRST_BLOCK]
        key = tile.first + i * spec.keys
        if spec.keys <= spec.block_size:
            block = lax.div(key, jnp.int32(spec.block_size))
            return [(base + self.refs["tables"][sequence, block], key - block * spec.block_size)]
        # What comes after the last block is not there: the last one is fetched again, from cache, and not looked at.
        last = lax.div(tile.end - 1, jnp.int32(spec.block_size))
        block = lax.div(key, jnp.int32(spec.block_size))
        entries = [jnp.minimum(block + j, last) for j in range(spec.keys // spec.block_size)]
        return [(base + self.refs["tables"][sequence, entry], 0) for entry in entries]

    def fetch(self, tile: _Tile, n: jax.Array, kind: str, blocks: list[tuple[jax.Array, Any]]) -> None:
        slot = lax.rem(n, jnp.int32(self.spec.stages))
        rows = min(self.spec.keys, self.spec.block_size)
        for j, (block, offset) in enumerate(blocks):
            plgpu.copy_gmem_to_smem(
                self.refs[f"{kind}_cache"].at[block, tile.head, pl.ds(offset, rows)],
                self.refs[f"{kind}_buffer"].at[slot, pl.ds(j * rows, rows)],
                self.refs[f"{kind}_full"].at[slot],
            )

    # The warpgroups that compute.

    def compute(self, tile: _Tile, steps_before: jax.Array) -> None:
        spec, refs, warpgroup = self.spec, self.refs, self.warpgroup
        mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        q_buffer, q_full = refs["q_buffer"].at[warpgroup], refs["q_full"].at[warpgroup]
        if spec.partial:
            skipped = jnp.int32(0)
            source, target = refs["q"].at[tile.columns[SEQUENCE], tile.head], q_buffer
            if spec.rows_out < WARPGROUP_ROWS:  # what lies in the other rows stays there
                target = q_buffer.at[pl.ds(0, spec.rows_out)]
            else:
                source = source.at[mine]
        else:
            granule = lax.div(tile.columns[ROW], jnp.int32(GRANULE)) * GRANULE
            skipped = tile.columns[ROW] - granule  # rows before the first one
            source = refs["q"].at[tile.head, pl.ds(granule + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            target = q_buffer
        plgpu.copy_gmem_to_smem(source, target, q_full)

        # The last key that a row sees, counted from the first key of the tile.
        position = tile.columns[POSITION]
        row = self.iota((WARPGROUP_ROWS,), 0) + (warpgroup * WARPGROUP_ROWS - skipped)
        last_seen = lax.div(row, jnp.int32(spec.group)) + (position - tile.first)  # [64]
        heads = pl.ds(GRANULE - skipped + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        slope = self.row_vector(refs["slopes"].at[tile.head, heads]) * LOG2E if "slopes" in refs else None
        top = self.full((WARPGROUP_ROWS,), NO_KEY)
        total = self.full((WARPGROUP_ROWS,), 0.0)
        if "sinks" in refs:  # one more logit, which the first piece of a context counts
            has_sink = tile.columns[HAS_SINK] > 0
            sink = self.row_vector(refs["sinks"].at[tile.head, heads]) * LOG2E
            top, total = jnp.where(has_sink, sink, top), jnp.where(has_sink, total + 1.0, total)
        acc = self.full((WARPGROUP_ROWS, spec.head_dim), 0.0)
        plgpu.barrier_wait(q_full)

        # Only the steps at the borders compare positions:  | window | seen by all rows ... | diagonal |
        all_seen = lax.div(position + 1 - tile.first, jnp.int32(spec.keys))
        borders = [jnp.int32(0), jnp.minimum(all_seen, tile.num_steps), tile.num_steps]
        if spec.has_window:
            # The last query's window starts behind this key; a single tile's query may be beyond the piece of keys.
            before = jnp.maximum(tile.end - 1, position) - tile.columns[WINDOW] - tile.first
            inside = jnp.where(before < 0, 0, lax.div(before, jnp.int32(spec.keys)) + 1)
            borders.insert(1, jnp.minimum(inside, borders[1]))
        state = (acc, top, total)
        masked = [True, False, True] if spec.has_window else [False, True]
        for begin, end, compare in zip(borders, borders[1:], masked, strict=False):

            def step(i: jax.Array, state: tuple[jax.Array, ...], compare: bool = compare) -> tuple[jax.Array, ...]:
                return self.step(
                    tile, i, steps_before, state, q_buffer=q_buffer, last_seen=last_seen, slope=slope, masked=compare
                )

            state = lax.fori_loop(begin, end, step, state)
        acc, top, total = state
        self.store(tile, acc / self.along_rows(total, acc.shape), top, total)

    def step(
        self, tile: _Tile, i: jax.Array, steps_before: jax.Array, state: tuple[jax.Array, ...], *, q_buffer: Any,
        last_seen: jax.Array, slope: jax.Array | None, masked: bool,
    ) -> tuple[jax.Array, ...]:  # fmt: skip
        """One step of the online softmax; scores are in units of log2."""
        spec, refs = self.spec, self.refs
        acc, top, total = state
        slot = lax.rem(steps_before + i, jnp.int32(spec.stages))
        shape = (WARPGROUP_ROWS, spec.keys)

        plgpu.barrier_wait(refs["k_full"].at[slot])

        scores = self.product_with_keys(q_buffer, refs["k_buffer"].at[slot])
        plgpu.barrier_arrive(refs["k_free"].at[slot])

        factor = spec.scale * LOG2E
        last_seen = last_seen - i * spec.keys  # counted from the first key of the step
        if spec.soft_cap is not None:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1): the hardware's own tanh is off by 5e-4, times the cap.
            power = jnp.exp2(scores * (2.0 * LOG2E * spec.scale / spec.soft_cap))
            scores, factor = (1.0 - 2.0 / (power + 1.0)) * (spec.soft_cap * LOG2E), 1.0
        if slope is not None:
            scores, factor = scores * factor, 1.0
            distance = self.iota(shape, 1) - self.along_rows(last_seen, shape)
            scores = scores + self.along_rows(slope, shape) * distance.astype(jnp.float32)
        if masked:
            key = self.iota(shape, 1)
            seen = key <= self.along_rows(last_seen, shape)
            if spec.has_window:
                seen = seen & (key > self.along_rows(last_seen - tile.columns[WINDOW], shape))
            scores = jnp.where(seen, scores, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
        weights = jnp.exp2(scores * factor - self.along_rows(new_top, shape))
        keep = jnp.exp2(top - new_top)
        total = total * keep + jnp.sum(weights, axis=1)
        acc = acc * self.along_rows(keep, acc.shape)
        weights = weights.astype(spec.dtype)
        if spec.warpgroups > 1:
            plgpu.barrier_arrive(refs["turn"])  # the other one may use the tensor cores, and we wait for it
        plgpu.barrier_wait(refs["v_full"].at[slot])
        if spec.warpgroups > 1:
            plgpu.barrier_wait(refs["turn"])
        if masked:
            self.blank_unseen_values(tile.end - tile.first - i * spec.keys, slot)
        acc = self.add_product(acc, weights, refs["v_buffer"].at[slot])
        plgpu.barrier_arrive(refs["v_free"].at[slot])
        return acc, new_top, total

    def take_turn(self) -> None:
        """Two warpgroups alternate: one computes weights while the other keeps the tensor cores busy."""
        if self.spec.warpgroups > 1:
            plgpu.barrier_arrive(self.refs["turn"])
            plgpu.barrier_wait(self.refs["turn"])

    def blank_unseen_values(self, num_keys: jax.Array, slot: jax.Array) -> None:
        """Zeros in place of the values behind the last key: weights of zero times what lies there may be NaN.

        Warpgroup 0 does it for both: it multiplies before it gives a turn to warpgroup 1.
        """
        spec = self.spec

        @pl.when((num_keys < spec.keys) & (self.warpgroup == 0))
        def _() -> None:
            for part in range(0, spec.keys, WARPGROUP_ROWS):
                values = self.refs["v_buffer"].at[slot, pl.ds(part, WARPGROUP_ROWS)]
                exists = self.iota((WARPGROUP_ROWS, spec.head_dim), 0) < num_keys - part
                values[...] = jnp.where(exists, values[...], jnp.zeros((), spec.dtype))
            plgpu.commit_smem()

    def store(self, tile: _Tile, result: jax.Array, top: jax.Array, total: jax.Array) -> None:
        spec, refs, warpgroup = self.spec, self.refs, self.warpgroup
        buffer = refs["out_buffer" if spec.partial else "q_buffer"].at[warpgroup]
        buffer[...] = result.astype(buffer.dtype)
        rows = min(WARPGROUP_ROWS, spec.rows_out)
        target = pl.ds(warpgroup * WARPGROUP_ROWS, rows) if spec.warpgroups > 1 else pl.ds(0, rows)
        if spec.partial:
            lse = refs["lse_buffer"].at[warpgroup]
            lse[...] = top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse.at[pl.ds(0, rows)], refs["lse"].at[tile.index, tile.head, target])
        else:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, rows)], refs["out"].at[tile.index, tile.head, target])
        plgpu.wait_smem_to_gmem(0)

    # What the interpreter knows by another name, or not at all.

    def layout(self, x: jax.Array) -> jax.Array:
        if self.spec.interpreted:
            return x
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA if x.ndim == 2 else plgpu.Layout.WGMMA.reduce(1))

    def iota(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        return self.layout(lax.broadcasted_iota(jnp.int32, shape, axis))

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        return self.layout(jnp.full(shape, value, jnp.float32))

    def row_vector(self, ref: Any) -> jax.Array:
        if self.spec.interpreted:
            return ref[...]
        # From global memory, a few bytes a thread, once a tile. Newer versions of JAX take no index.
        index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []
        return plgpu.load(ref, *index, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def along_rows(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, [0])

    def product_with_keys(self, queries: Any, keys: Any) -> jax.Array:
        """queries @ keys.T; our turn ends when the tensor cores have all of it."""
        if self.spec.interpreted:  # it cannot transpose an operand
            self.take_turn()
            return lax.dot_general(queries[...], keys[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

        def multiply(scores: Any) -> jax.Array:
            plgpu.wgmma(scores, queries, plgpu.transpose_ref(keys, (1, 0)))
            self.take_turn()
            return scores[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((queries.shape[0], keys.shape[0]), jnp.float32))

    def add_product(self, acc: jax.Array, weights: jax.Array, values: Any) -> jax.Array:
        """acc + weights @ values, the weights from registers."""
        if self.spec.interpreted:  # it has neither accumulators that start with a value nor operands in registers
            return acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        accumulator: Any = plgpu.WGMMAAccumulatorRef.init(acc)
        result: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(accumulator)
        return result
