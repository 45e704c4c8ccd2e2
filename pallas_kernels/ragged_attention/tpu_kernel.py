"""The body of the TPU attention kernel: what one core does with its share of the q tiles.

A q tile is a piece of work with its own queries, running sums and result. There are two kinds:

  single tiles   J sequences with one query each, side by side:  J x K independent products keep the MXU busy
  chunk tiles    Q consecutive queries of one sequence

Both walk over their keys in pieces of C blocks; a single tile gives each sequence C/J of them. While a piece is
computed the next one is on its way, also across the border to the next tile:

  tables   | row of tile i+1 ............ |                     HBM -> SMEM
  queries  |   | rows of tile i+1 ....... |                     HBM -> VMEM
  keys     | i:1 | i:2 | i:3 | i+1:0 |                          HBM -> VMEM, two buffers
  compute  | i:0 | i:1 | i:2 | i:3 | i+1:0 |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
TABLE_BITS = 7
TABLE_PIECE = 1 << TABLE_BITS  # block ids that one copy brings into SMEM
# Finite, so that a row that has seen no key yet gives weights of exp(0), not NaN; the first real key makes them 0.
MASKED = -1e30
NO_WINDOW = 2**31 - 1

# Where the scalars of a call stand in `scalars`.
NUM_SINGLE_TILES, NUM_TILES, FIRST_BLOCK, WINDOW = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What is known of a call when it is compiled."""

    num_kv_heads: int  # K
    group: int  # G
    head_dim: int  # D
    block_size: int  # B
    piece: int  # C, blocks that are fetched together
    sequences: int  # J, sequences of a single tile
    queries: int  # Q, queries of a chunk tile; a power of two
    max_single_tiles: int
    has_chunks: bool
    has_window: bool
    cores: int
    scale: float
    soft_cap: float | None
    precision: lax.Precision

    @property
    def share(self) -> int:
        """Blocks of a piece that belong to one sequence of a single tile."""
        return self.piece // self.sequences

    @property
    def block_bits(self) -> int:
        """Everything is a power of two: a shift is one scalar operation, a division is ten."""
        return self.block_size.bit_length() - 1

    @property
    def share_bits(self) -> int:
        return self.share.bit_length() - 1

    @property
    def slice(self) -> int:
        """Queries of a chunk tile that are transposed at once."""
        return min(self.queries, 16)

    @property
    def padded_group(self) -> int:
        """Rows of a single query's heads, padded to the sublanes of a register."""
        return -(-self.group // 8) * 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Everything the kernel reads and writes; shapes in brackets."""

    scalars: Any  # SMEM i32[4]
    sequence: Any  # SMEM i32[tiles * J], these four describe the members of each tile; a chunk tile repeats its one
    token: Any  # row of q of the first query
    position: Any  # of the first query in its sequence
    count: Any  # queries; 0 for a member without work
    q: Any  # HBM [T, H, D]
    k_cache: Any  # HBM [L*N, K, B, D]
    v_cache: Any
    tables: Any  # HBM i32[S, W, 1, TABLE_PIECE]
    slopes: Any  # VMEM f32[K, Gp, LANES] or None
    sinks: Any  # VMEM f32[K, Gp, LANES] or None
    out: Any  # HBM [T, H, D]
    table_buffer: Any  # SMEM i32[2, J, W, 1, TABLE_PIECE]
    q_buffer: Any  # VMEM [max(Q, J), H, D]
    k_buffer: Any  # VMEM [2, C, K, B, D]
    v_buffer: Any
    out_buffer: Any  # VMEM [max(Q, J), H, D]
    q_single: Any  # VMEM f32[J * K, Gp, D]
    top_single: Any  # VMEM f32[J * K, Gp, LANES], the largest score so far
    total_single: Any  # VMEM f32[J * K, Gp, LANES], sums of weights, one a lane
    acc_single: Any  # VMEM f32[J * K, Gp, D]
    q_chunk: Any  # VMEM [H, Q, D]; these four are None where no chunk fits
    top_chunk: Any  # VMEM f32[H, Q, LANES]
    total_chunk: Any
    acc_chunk: Any  # VMEM f32[H, Q, D]
    table_sem: Any  # DMA semaphores [2]
    kv_sem: Any  # [2]
    q_sem: Any  # [1]
    out_sem: Any  # [1]


def attend_tiles(refs: Refs, spec: Spec) -> None:
    """Walks over the tiles core, core + cores, core + 2*cores, ...: single tiles first, then chunk tiles."""
    kernel = _Kernel(refs, spec)
    core = pl.program_id(0)
    num_single, num_tiles = refs.scalars[NUM_SINGLE_TILES], refs.scalars[NUM_TILES]
    num_mine = pl.cdiv(num_tiles - core, spec.cores)
    num_mine_single = pl.cdiv(num_single - core, spec.cores)

    @pl.when(num_mine > 0)
    def _() -> None:
        # Keys that are not fetched meet weights of zero, but zero times what memory held before may be NaN.
        def blank(c: jax.Array, _: None) -> None:
            for buffer in range(2):
                refs.v_buffer[buffer, c] = jnp.zeros(refs.v_buffer.shape[2:], refs.v_buffer.dtype)

        lax.fori_loop(0, spec.piece, blank, None)
        refs.q_single[...] = jnp.zeros_like(refs.q_single)
        kernel.copy_tables(core, 0, "start")
        kernel.copy_queries(core, "start")
        kernel.copy_tables(core, 0, "wait")
        kernel.copy_keys(core, 0, 0, 0, "start")

        def tile(ordinal: jax.Array, buffer: jax.Array, *, single: bool) -> jax.Array:
            return kernel.attend_tile(core + ordinal * spec.cores, ordinal % 2, buffer, single=single)

        buffer = lax.fori_loop(0, num_mine_single, lambda n, buffer: tile(n, buffer, single=True), jnp.int32(0))
        if spec.has_chunks:
            lax.fori_loop(num_mine_single, num_mine, lambda n, buffer: tile(n, buffer, single=False), buffer)
        kernel.copy_results(core + (num_mine - 1) * spec.cores, "wait")


def _cdiv(n: jax.Array, bits: int) -> jax.Array:
    """n / 2**bits, rounded up."""
    return (n + (1 << bits) - 1) >> bits


class _Kernel:
    """The steps of the walk. `i` is a tile, `r` the number of a piece within it, `j` a member of a single tile."""

    def __init__(self, refs: Refs, spec: Spec) -> None:
        self.refs, self.spec = refs, spec

    # --- what a tile consists of -------------------------------------------------------------------------------

    def is_single(self, i: jax.Array) -> jax.Array:
        return i < self.refs.scalars[NUM_SINGLE_TILES]

    def member(self, i: jax.Array, j: int) -> jax.Array:
        """Where member j of tile i stands in `sequence`, `token`, `position` and `count`."""
        row = jnp.where(self.is_single(i), i, i - self.refs.scalars[NUM_SINGLE_TILES] + self.spec.max_single_tiles)
        return row * self.spec.sequences + j

    def key_range(self, i: jax.Array, j: int) -> tuple[jax.Array | int, jax.Array]:
        """The first key that any query of the member sees, and the one behind the last."""
        e = self.member(i, j)
        end = self.refs.position[e] + self.refs.count[e]
        if not self.spec.has_window:
            return 0, end
        return jnp.maximum(self.refs.position[e] - self.refs.scalars[WINDOW] + 1, 0), end

    def num_pieces(self, i: jax.Array, *, single: bool) -> jax.Array:
        members, blocks = (self.spec.sequences, self.spec.share) if single else (1, self.spec.piece)
        bits = (blocks * self.spec.block_size).bit_length() - 1
        pieces = jnp.int32(0)
        for j in range(members):
            first, end = self.key_range(i, j)
            pieces = jnp.maximum(pieces, _cdiv(end, bits) - (first >> bits))
        return pieces

    def first_block(self, i: jax.Array, r: jax.Array | int, j: int) -> jax.Array:
        """The block of the sequence that lies first in part j of piece r, whether it is needed or not."""
        parts, bits = self.spec.sequences, self.spec.block_bits + self.spec.share_bits
        first, _ = self.key_range(i, j)
        # A chunk tile's piece is J parts in a row; in a single tile part j belongs to member j.
        of_single = (first >> bits) + r
        of_chunk = ((first >> (bits + parts.bit_length() - 1)) + r) * parts + j
        return jnp.where(self.is_single(i), of_single, of_chunk) << self.spec.share_bits

    # --- copies ------------------------------------------------------------------------------------------------

    def copy_tables(self, i: jax.Array, buffer: jax.Array | int, do: str) -> None:
        """The pieces of the members' block tables that hold needed blocks."""
        refs, bits = self.refs, TABLE_BITS + self.spec.block_bits
        for j in range(self.spec.sequences):
            first, end = self.key_range(i, j)
            begin, stop = first >> bits, _cdiv(end, bits)
            if j > 0:  # the parts of a chunk tile share one table
                stop = jnp.where(self.is_single(i), stop, begin)
            row = refs.sequence[self.member(i, j)]

            def piece(w: jax.Array, _: None, *, j: int = j, row: jax.Array = row) -> None:
                copy = pltpu.make_async_copy(
                    refs.tables.at[row, w], refs.table_buffer.at[buffer, j, w], refs.table_sem.at[buffer]
                )
                getattr(copy, do)()

            lax.fori_loop(begin, stop, piece, None)

    def copy_keys(
        self, i: jax.Array, r: jax.Array | int, buffer: jax.Array | int, tables: jax.Array | int, do: str
    ) -> None:
        """The blocks of piece r that hold keys which some query of the tile sees; no others."""
        refs, spec = self.refs, self.spec
        for j in range(spec.sequences):
            first, end = self.key_range(i, j)
            start = self.first_block(i, r, j)
            table = jnp.where(self.is_single(i), j, 0)
            begin = jnp.maximum(start, first >> spec.block_bits)
            stop = jnp.minimum(start + spec.share, _cdiv(end, spec.block_bits))

            def block(b: jax.Array, *, j: int = j, start: jax.Array = start, table: jax.Array = table) -> None:
                entry = refs.table_buffer[tables, table, b >> TABLE_BITS, 0, b & (TABLE_PIECE - 1)]
                # A wait counts bytes: which block they come from does not matter.
                source = refs.scalars[FIRST_BLOCK] + entry if do == "start" else 0
                self._copy_blocks(pl.ds(source, 1), buffer, pl.ds(j * spec.share + b - start, 1), do)

            def all_blocks(*, j: int = j, start: jax.Array = start, block: Any = block) -> None:
                if do == "wait":
                    self._copy_blocks(pl.ds(0, spec.share), buffer, pl.ds(j * spec.share, spec.share), do)
                    return
                unroll = min(spec.share, 8)
                lax.fori_loop(
                    0, spec.share // unroll, lambda n, _: [block(start + n * unroll + m) for m in range(unroll)] and None, None
                )

            complete = stop - begin == spec.share
            pl.when(complete)(all_blocks)
            stop = jnp.where(complete, begin, stop)
            lax.fori_loop(begin, stop, lambda b, _, block=block: block(b), None)

    def _copy_blocks(self, source: Any, buffer: jax.Array | int, target: Any, do: str) -> None:
        refs = self.refs
        for cache, keys in ((refs.k_cache, refs.k_buffer), (refs.v_cache, refs.v_buffer)):
            copy = pltpu.make_async_copy(cache.at[source], keys.at[buffer, target], refs.kv_sem.at[buffer])
            getattr(copy, do)()

    def copy_queries(self, i: jax.Array, do: str) -> None:
        self._copy_rows(i, do, lambda token, row, n: (
            self.refs.q.at[pl.ds(token, n)], self.refs.q_buffer.at[pl.ds(row, n)], self.refs.q_sem.at[0]
        ))

    def copy_results(self, i: jax.Array, do: str) -> None:
        self._copy_rows(i, do, lambda token, row, n: (
            self.refs.out_buffer.at[pl.ds(row, n)], self.refs.out.at[pl.ds(token, n)], self.refs.out_sem.at[0]
        ))

    def _copy_rows(self, i: jax.Array, do: str, ends: Any) -> None:
        """Copies exactly the rows of the tile's queries: `ends(token, row, n)` are source, target and semaphore."""
        refs, spec = self.refs, self.spec

        @pl.when(self.is_single(i))
        def _() -> None:
            for j in range(spec.sequences):
                e = self.member(i, j)

                @pl.when(refs.count[e] > 0)
                def _(e: jax.Array = e, j: int = j) -> None:
                    getattr(pltpu.make_async_copy(*ends(refs.token[e], j, 1)), do)()

        if not spec.has_chunks:
            return

        @pl.when(jnp.logical_not(self.is_single(i)))
        def _() -> None:
            e = self.member(i, 0)
            size = spec.queries
            while size:  # a copy has a fixed size, so a count of rows is copied by its binary digits
                @pl.when((refs.count[e] & size) != 0)
                def _(size: int = size) -> None:
                    row = refs.count[e] & -(2 * size)
                    getattr(pltpu.make_async_copy(*ends(refs.token[e] + row, row, size)), do)()

                size //= 2

    # --- one tile ----------------------------------------------------------------------------------------------

    def attend_tile(self, i: jax.Array, tables: jax.Array, buffer: jax.Array, *, single: bool) -> jax.Array:
        """Computes tile i, whose block tables and first piece are there or on their way; returns the next buffer."""
        refs, spec = self.refs, self.spec
        following = i + spec.cores
        has_following = following < refs.scalars[NUM_TILES]
        num_pieces = self.num_pieces(i, single=single)

        self.copy_queries(i, "wait")
        self.load_queries(single=single)

        @pl.when(has_following)
        def _() -> None:
            self.copy_tables(following, 1 - tables, "start")
            self.copy_queries(following, "start")

        def piece(r: jax.Array, buffer: jax.Array) -> jax.Array:
            @pl.when(r + 1 < num_pieces)
            def _() -> None:
                self.copy_keys(i, r + 1, 1 - buffer, tables, "start")

            @pl.when((r + 1 == num_pieces) & has_following)
            def _() -> None:
                self.copy_tables(following, 1 - tables, "wait")
                self.copy_keys(following, 0, 1 - buffer, 1 - tables, "start")

            self.copy_keys(i, r, buffer, tables, "wait")
            self.blank_unseen_values(i, r, buffer, single=single)
            (self.attend_singles if single else self.attend_chunk)(i, r, buffer)
            return 1 - buffer

        buffer = lax.fori_loop(0, num_pieces, piece, buffer)

        @pl.when(i >= spec.cores)
        def _() -> None:
            self.copy_results(i - spec.cores, "wait")

        self.store_results(single=single)
        self.copy_results(i, "start")
        return buffer

    def blank_unseen_values(self, i: jax.Array, r: jax.Array, buffer: jax.Array, *, single: bool) -> None:
        """Zeros in place of the values that no query of the tile sees but that lie in a fetched block."""
        spec, values = self.spec, self.refs.v_buffer
        for j in range(spec.sequences if single else 1):
            first, end = self.key_range(i, j)
            start, blocks = self.first_block(i, r, j), spec.share if single else spec.piece
            borders = [(end, "end")] + ([(first, "first")] if spec.has_window else [])
            for key, kind in borders:
                block, offset = key >> spec.block_bits, key & (spec.block_size - 1)

                @pl.when((block >= start) & (block < start + blocks) & (offset > 0))
                def _(j: int = j, start: jax.Array = start, block: Any = block, offset: Any = offset, kind: str = kind) -> None:
                    at = (buffer, j * spec.share + block - start)
                    row = lax.broadcasted_iota(jnp.int32, values.shape[2:], 1)
                    seen = row < offset if kind == "end" else row >= offset
                    old = values[at].astype(jnp.float32)
                    values[at] = jnp.where(seen, old, 0.0).astype(values.dtype)

    # --- arithmetic --------------------------------------------------------------------------------------------

    def load_queries(self, *, single: bool) -> None:
        """Rows of the same KV head come to lie together; the running sums start anew."""
        refs, spec = self.refs, self.spec
        if single:
            for j in range(spec.sequences):
                heads = refs.q_buffer[j].astype(jnp.float32)  # [H, D]
                for h in range(spec.num_kv_heads):
                    refs.q_single[j * spec.num_kv_heads + h, : spec.group] = heads[h * spec.group : (h + 1) * spec.group]
            sums = (refs.top_single, refs.total_single, refs.acc_single)
        else:
            def transpose(start: jax.Array) -> None:
                rows = refs.q_buffer[pl.ds(start, spec.slice)].astype(jnp.float32)  # [slice, H, D]
                refs.q_chunk[:, pl.ds(start, spec.slice)] = jnp.swapaxes(rows, 0, 1).astype(refs.q_chunk.dtype)

            self.for_slices(transpose)
            sums = (refs.top_chunk, refs.total_chunk, refs.acc_chunk)
        for ref, start in zip(sums, (MASKED, 0.0, 0.0), strict=True):
            ref[...] = jnp.full_like(ref, start)

    def for_slices(self, do: Callable[[jax.Array], None]) -> None:
        """Calls `do` with the first query of each slice of a chunk tile: a transposition in one go is all code."""
        size = self.spec.slice
        lax.fori_loop(0, self.spec.queries // size, lambda n, _: do(pl.multiple_of(n * size, size)), None)

    def attend_singles(self, i: jax.Array, r: jax.Array, buffer: jax.Array) -> None:
        refs, spec = self.refs, self.spec
        for j in range(spec.sequences):
            position = refs.position[self.member(i, j)]
            first_key = self.first_block(i, r, j) * spec.block_size
            blocks = pl.ds(j * spec.share, spec.share)
            for h in range(spec.num_kv_heads):
                n = j * spec.num_kv_heads + h
                refs.top_single[n], refs.total_single[n], refs.acc_single[n] = self.attend(
                    refs.q_single[n],
                    self.keys(refs.k_buffer[buffer, blocks, h]),
                    self.keys(refs.v_buffer[buffer, blocks, h]),
                    (refs.top_single[n], refs.total_single[n], refs.acc_single[n]),
                    query_position=position,
                    first_key=first_key,
                    slopes=None if refs.slopes is None else refs.slopes[h],
                    masked=True,
                )

    def attend_chunk(self, i: jax.Array, r: jax.Array, buffer: jax.Array) -> None:
        refs, spec = self.refs, self.spec
        g, q = spec.group, spec.queries
        e = self.member(i, 0)
        position = refs.position[e]
        first_key = self.first_block(i, r, 0) * spec.block_size
        last_key = first_key + spec.piece * spec.block_size - 1
        # Every query sees every key: nothing to compare.
        all_seen = last_key <= position
        if spec.has_window:
            all_seen &= first_key > position + q - 1 - refs.scalars[WINDOW]

        def attend_head(h: jax.Array, masked: bool) -> None:
            heads = pl.ds(h * g, g)
            query_position = position + lax.broadcasted_iota(jnp.int32, (g, q, 1), 1).reshape(g * q, 1)
            slopes = None
            if refs.slopes is not None:
                slopes = jnp.broadcast_to(refs.slopes[h][:g, None], (g, q, LANES)).reshape(g * q, LANES)
            state = [ref[heads].reshape(g * q, -1) for ref in (refs.top_chunk, refs.total_chunk, refs.acc_chunk)]
            state = self.attend(
                refs.q_chunk[heads].reshape(g * q, -1),
                self.keys(refs.k_buffer[buffer, :, h]),
                self.keys(refs.v_buffer[buffer, :, h]),
                state,
                query_position=query_position,
                first_key=first_key,
                slopes=slopes,
                masked=masked,
            )
            for ref, new in zip((refs.top_chunk, refs.total_chunk, refs.acc_chunk), state, strict=True):
                ref[heads] = new.reshape(g, q, -1)

        for masked in (False, True):
            @pl.when(all_seen != masked)
            def _(masked: bool = masked) -> None:
                lax.fori_loop(0, spec.num_kv_heads, lambda h, _: attend_head(h, masked), None)

    def keys(self, blocks: jax.Array) -> jax.Array:
        """[C, B, D] -> [C*B, D]: blocks are stored head by head, so this moves nothing."""
        return blocks.reshape(-1, self.spec.head_dim)

    def attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        state: Any,
        *,
        query_position: jax.Array,
        first_key: jax.Array,
        slopes: jax.Array | None,
        masked: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One step of the online softmax for rows [R, D] and keys [J, D]; state as in `Refs`, flattened to rows."""
        spec = self.spec
        top, total, acc = state
        num_keys = keys.shape[0]
        scores = lax.dot_general(
            queries.astype(keys.dtype), keys, (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32, precision=spec.precision,
        )  # [R, J]  # fmt: skip
        if spec.soft_cap is None:
            scores = scores * spec.scale
        else:
            scores = jnp.tanh(scores * (spec.scale / spec.soft_cap)) * spec.soft_cap
        if masked or slopes is not None:
            key = first_key + lax.broadcasted_iota(jnp.int32, (1, num_keys), 1)
            distance = key - query_position  # [R, J], or [1, J] for a single query
            if slopes is not None:
                scores = scores + slopes[:, :1] * distance.astype(jnp.float32)
            if masked:
                visible = distance <= 0
                if spec.has_window:
                    visible &= distance > -self.refs.scalars[WINDOW]
                scores = jnp.where(visible, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))  # [R, LANES]
        weights = jnp.exp(scores - new_top[:, :1])
        keep = jnp.exp(top - new_top)
        # One sum a lane: they meet once, when the tile is finished.
        total = total * keep
        for start in range(0, num_keys, LANES):
            total = total + weights[:, start : start + LANES]
        weighted = jnp.dot(
            weights.astype(values.dtype), values, preferred_element_type=jnp.float32, precision=spec.precision
        )
        return new_top, total, acc * self.across(keep, acc.shape[1]) + weighted

    def across(self, rows: jax.Array, width: int) -> jax.Array:
        """[R, LANES], equal along a row -> [R, width]."""
        return jnp.concatenate([rows] * (width // LANES), axis=1)

    def store_results(self, *, single: bool) -> None:
        """acc / total, with the sinks' share in the total, laid out as [queries, H, D]."""
        refs, spec = self.refs, self.spec
        g, q = spec.group, spec.queries
        if not single:
            def finish_head(h: jax.Array, _: None) -> None:
                heads = pl.ds(h * g, g)
                top, total, acc = (
                    ref[heads].reshape(g * q, -1) for ref in (refs.top_chunk, refs.total_chunk, refs.acc_chunk)
                )
                sinks = None
                if refs.sinks is not None:
                    sinks = jnp.broadcast_to(refs.sinks[h][:g, None], (g, q, LANES)).reshape(g * q, LANES)
                refs.acc_chunk[heads] = self.normalised(top, total, acc, sinks).reshape(g, q, -1)

            lax.fori_loop(0, spec.num_kv_heads, finish_head, None)

            def transpose(start: jax.Array) -> None:
                rows = jnp.swapaxes(refs.acc_chunk[:, pl.ds(start, spec.slice)], 0, 1)  # [slice, H, D]
                refs.out_buffer[pl.ds(start, spec.slice)] = rows.astype(refs.out_buffer.dtype)

            self.for_slices(transpose)
            return
        for j in range(spec.sequences):
            heads = []
            for h in range(spec.num_kv_heads):
                n = j * spec.num_kv_heads + h
                sinks = None if refs.sinks is None else refs.sinks[h]
                result = self.normalised(refs.top_single[n], refs.total_single[n], refs.acc_single[n], sinks)
                heads.append(result[:g])
            refs.out_buffer[j] = jnp.concatenate(heads, axis=0).astype(refs.out_buffer.dtype)

    def normalised(self, top: jax.Array, total: jax.Array, acc: jax.Array, sinks: jax.Array | None) -> jax.Array:
        total = jnp.sum(total, axis=1, keepdims=True)  # [R, 1]
        if sinks is not None:
            base = jnp.maximum(top, sinks)[:, :1]
            keep = jnp.exp(top[:, :1] - base)
            total, acc = total * keep + jnp.exp(sinks[:, :1] - base), acc * keep
        return acc / total
