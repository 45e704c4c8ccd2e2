"""The geometry of a tile of the TPU attention kernel, and the copies that load and store it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pallas_types import Ref
from pallas_kernels.ragged_attention.tpu.write import FIRST_BLOCK, NUM_GRANULES

TABLE_BITS = 7
TABLE_PIECE = 1 << TABLE_BITS  # block ids that one copy loads into SMEM
NO_WINDOW = 2**31 - 1

# Positions of a call's scalars in `scalars`; `write` has the first two.
NUM_SINGLE_TILES, NUM_TILES, WINDOW, FIRST_USED, END_USED = range(NUM_GRANULES + 1, NUM_GRANULES + 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static properties of a call."""

    num_kv_heads: int  # K
    group: int  # G
    width: int  # numbers of a row of the cache: D, or 2D if it is packed
    packed: bool  # whether a row holds a key and a value
    block_size: int  # B
    piece: int  # C, blocks that are fetched together
    sequences: int  # J, sequences per single tile
    queries: int  # Q, queries per chunk tile; a power of two
    max_single_tiles: int
    has_chunks: bool
    has_window: bool
    cores: int
    scale: float
    soft_cap: float | None
    precision: lax.Precision
    product_dtype: np.dtype  # dtype of the operands of matrix products
    zero_values: bool  # whether values outside every context can be NaN

    @property
    def share(self) -> int:
        """Blocks of a piece that belong to one sequence of a single tile."""
        return self.piece // self.sequences

    @property
    def block_bits(self) -> int:
        """log2(B): a shift is one scalar operation, a division is ten."""
        return self.block_size.bit_length() - 1

    @property
    def share_bits(self) -> int:
        return self.share.bit_length() - 1

    @property
    def slice(self) -> int:
        """Queries of a chunk tile that are transposed together."""
        return min(self.queries, 16)

    @property
    def padded_group(self) -> int:
        """Rows of a single query's heads, padded to the sublanes of a register."""
        return -(-self.group // 8) * 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """Everything that the kernel reads and writes; shapes in brackets, where W is D, or 2D if the cache is packed."""

    scalars: Ref  # SMEM i32[7]
    sequence: Ref  # SMEM i32[tiles * J]; these four describe each tile's members; a chunk tile repeats its single member
    token: Ref  # row of the first query in q
    position: Ref  # position of the first query in its sequence
    count: Ref  # number of queries; 0 for a member without work
    q: Ref  # HBM [T, H, W]
    k_cache: Ref  # HBM [L*N, K, B, W]
    v_cache: Ref  # None if values are in the rows of keys: packed, or as parts of them; likewise the other three of values
    k_scales: Ref  # HBM f32[L*N, K, B] for an 8-bit cache, 2K if it is packed; otherwise None
    v_scales: Ref
    tables: Ref  # HBM i32[S, W, 1, TABLE_PIECE]
    slopes: Ref  # VMEM f32[K, Gp, LANES] or None
    sinks: Ref  # VMEM f32[K, Gp, LANES] or None
    out: Ref  # HBM [T, H, W]
    table_buffer: Ref  # SMEM i32[2, J, W, 1, TABLE_PIECE]
    q_buffer: Ref  # VMEM [max(Q, J), H, W]
    k_buffer: Ref  # VMEM [2, C, K, B, W]
    v_buffer: Ref
    k_scale_buffer: Ref  # VMEM f32[2, C, K, B] or None
    v_scale_buffer: Ref
    out_buffer: Ref  # VMEM [max(Q, J), H, W]
    q_single: Ref  # VMEM f32[J * K, Gp, W]
    top_single: Ref  # VMEM f32[J * K, Gp, LANES], the largest score so far
    total_single: Ref  # VMEM f32[J * K, Gp, LANES], sums of weights, one per lane
    acc_single: Ref  # VMEM f32[J * K, Gp, W]
    q_chunk: Ref  # VMEM [H, Q, W]; these four are None if no chunk fits
    top_chunk: Ref  # VMEM f32[H, Q, LANES]
    total_chunk: Ref
    acc_chunk: Ref  # VMEM f32[H, Q, W]
    table_sem: Ref  # DMA semaphores [2]
    kv_sem: Ref  # [2]
    q_sem: Ref  # [1]
    out_sem: Ref  # [1]

    @property
    def value_buffers(self) -> list[Ref]:
        """The buffers that hold values, and their scales if there are any."""
        pair = (self.v_buffer, self.v_scale_buffer) if self.v_buffer is not None else (self.k_buffer, self.k_scale_buffer)
        return [ref for ref in pair if ref is not None]


def _cdiv(n: jax.Array, bits: int) -> jax.Array:
    """n / 2**bits, rounded up."""
    return (n + (1 << bits) - 1) >> bits


class Copies:
    """Geometry and copies. `i` is a tile, `r` the index of a piece within it, `j` a member of a single tile.

    Every copy method is called twice: with do="start" to start the copy, and with do="wait" to wait for it.
    """

    def __init__(self, refs: Refs, spec: Spec) -> None:
        self.refs, self.spec = refs, spec
        pairs = [
            (refs.k_cache, refs.k_buffer),
            (refs.v_cache, refs.v_buffer),
            (refs.k_scales, refs.k_scale_buffer),
            (refs.v_scales, refs.v_scale_buffer),
        ]
        self.caches = [(cache, buffer) for cache, buffer in pairs if cache is not None]

    def is_single(self, i: jax.Array) -> jax.Array:
        return i < self.refs.scalars[NUM_SINGLE_TILES]

    def member(self, i: jax.Array, j: int) -> jax.Array:
        """Index of member j of tile i in `sequence`, `token`, `position` and `count`."""
        row = jnp.where(self.is_single(i), i, i - self.refs.scalars[NUM_SINGLE_TILES] + self.spec.max_single_tiles)
        return row * self.spec.sequences + j

    def key_range(self, i: jax.Array, j: int) -> tuple[jax.Array | int, jax.Array]:
        """The first key visible to any query of the member, and the end of the range (exclusive)."""
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
        """The sequence's first block in part j of piece r, even if it is not needed."""
        parts, bits = self.spec.sequences, self.spec.block_bits + self.spec.share_bits
        first, _ = self.key_range(i, j)
        # A piece of a chunk tile is J consecutive parts; in a single tile, part j belongs to member j.
        of_single = (first >> bits) + r
        of_chunk = ((first >> (bits + parts.bit_length() - 1)) + r) * parts + j
        return jnp.where(self.is_single(i), of_single, of_chunk) << self.spec.share_bits

    def copy_tables(self, i: jax.Array, buffer: jax.Array | int, do: str) -> None:
        """Copies the pieces of the members' block tables that contain needed blocks."""
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

    def copy_keys(self, i: jax.Array, r: jax.Array | int, buffer: jax.Array | int, tables: jax.Array | int, do: str) -> None:
        """Copies the blocks of piece r that hold keys visible to some query of the tile, and no others."""
        spec = self.spec
        for j in range(spec.sequences):
            first, end = self.key_range(i, j)
            start = self.first_block(i, r, j)
            begin = jnp.maximum(start, first >> spec.block_bits)
            stop = jnp.minimum(start + spec.share, _cdiv(end, spec.block_bits))
            table = jnp.where(self.is_single(i), j, 0)
            block = functools.partial(
                self._start_block, tables=(tables, table), buffer=buffer, offset=j * spec.share - start
            )
            if do == "wait":
                block = functools.partial(self._wait_for_blocks, buffer=buffer, count=1)

            def all_blocks(*, j: int = j, start: jax.Array = start, block: Callable[[jax.Array], None] = block) -> None:
                if do == "wait":
                    self._wait_for_blocks(0, buffer=buffer, count=spec.share)
                    return
                unroll = min(spec.share, 8)  # the scalar unit works on several addresses at the same time

                def some(n: jax.Array, _: None) -> None:
                    for m in range(unroll):
                        block(start + n * unroll + m)

                lax.fori_loop(0, spec.share // unroll, some, None)

            complete = stop - begin == spec.share
            pl.when(complete)(all_blocks)
            stop = jnp.where(complete, begin, stop)
            lax.fori_loop(begin, stop, lambda b, _, block=block: block(b), None)

    def _start_block(
        self, b: jax.Array, *, tables: tuple[jax.Array | int, jax.Array | int], buffer: jax.Array | int, offset: jax.Array
    ) -> None:
        """Starts copying K and V of block b of a sequence to index b + offset of the buffer."""
        refs = self.refs
        block = refs.scalars[FIRST_BLOCK] + refs.table_buffer[*tables, b >> TABLE_BITS, 0, b & (TABLE_PIECE - 1)]
        for cache, keys in self.caches:
            pltpu.make_async_copy(cache.at[block], keys.at[buffer, b + offset], refs.kv_sem.at[buffer]).start()

    def _wait_for_blocks(self, _block: object, *, buffer: jax.Array | int, count: int) -> None:
        """Waits for any `count` blocks of K and of V: a wait counts bytes, regardless of their source."""
        for _, keys in self.caches:
            some = keys.at[buffer, pl.ds(0, count)]
            pltpu.make_async_copy(some, some, self.refs.kv_sem.at[buffer]).wait()

    def copy_queries(self, i: jax.Array, do: str) -> None:
        self._copy_rows(
            i,
            do,
            lambda token, row, n: (
                self.refs.q.at[pl.ds(token, n)],
                self.refs.q_buffer.at[pl.ds(row, n)],
                self.refs.q_sem.at[0],
            ),
        )

    def copy_results(self, i: jax.Array, do: str) -> None:
        self._copy_rows(
            i,
            do,
            lambda token, row, n: (
                self.refs.out_buffer.at[pl.ds(row, n)],
                self.refs.out.at[pl.ds(token, n)],
                self.refs.out_sem.at[0],
            ),
        )

    @property
    def zero_rows(self) -> int:
        """How many rows of `out_buffer` are zeros until the first result is stored; a power of two."""
        return min(8, 1 << (self.refs.out_buffer.shape[0].bit_length() - 1))

    def copy_zeros(self, do: str) -> None:
        """Zeroes the results of tokens that belong to no chunk, before the first chunk and after the last."""
        refs, most = self.refs, self.zero_rows
        scalars = refs.scalars
        for first, end in ((0, scalars[FIRST_USED]), (scalars[END_USED], refs.out.shape[0])):

            def copy(row: jax.Array, size: int, first: jax.Array | int = first) -> None:
                target = refs.out.at[pl.ds(first + row, size)]
                getattr(pltpu.make_async_copy(refs.out_buffer.at[pl.ds(0, size)], target, refs.out_sem.at[0]), do)()

            count, size = end - first, most // 2
            lax.fori_loop(0, count // most, lambda n, _, copy=copy: copy(n * most, most), None)
            while size:

                @pl.when((count & size) != 0)
                def _(count: jax.Array = count, size: int = size, copy: Callable[..., None] = copy) -> None:
                    copy(count & -(2 * size), size)

                size //= 2

    def _copy_rows(
        self, i: jax.Array, do: str, ends: Callable[[jax.Array, jax.Array | int, int], tuple[Ref, Ref, Ref]]
    ) -> None:
        """Copies exactly the rows of the tile's queries; `ends(token, row, n)` returns source, target and semaphore."""
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
            while size:  # copies have static sizes: rows are copied in powers of two, the binary digits of their count

                @pl.when((refs.count[e] & size) != 0)
                def _(size: int = size) -> None:
                    row = refs.count[e] & -(2 * size)
                    getattr(pltpu.make_async_copy(*ends(refs.token[e] + row, row, size)), do)()

                size //= 2
