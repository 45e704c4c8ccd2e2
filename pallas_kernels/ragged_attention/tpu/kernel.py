"""The body of the TPU attention kernel: how one core processes its share of the q tiles.

A q tile is a unit of work with its own queries, running sums and result. There are two kinds:

  single tiles   J sequences with one query each, side by side:  J x K independent products keep the MXU busy
  chunk tiles    Q consecutive queries of one sequence

Both process their keys in pieces of C blocks; in a single tile, C/J of them belong to each sequence. While one piece is
computed, the next one is being copied, also across tile boundaries:

  tables   | row of tile i+1 ............ |                     HBM -> SMEM
  queries  |   | rows of tile i+1 ....... |                     HBM -> VMEM
  keys     | i:1 | i:2 | i:3 | i+1:0 |                          HBM -> VMEM, two buffers
  compute  | i:0 | i:1 | i:2 | i:3 | i+1:0 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.pallas_types import Ref
from pallas_kernels.ragged_attention.tpu.copies import NUM_SINGLE_TILES, NUM_TILES, WINDOW, Copies, Refs, Spec
from pallas_kernels.ragged_attention.tpu.support import LANES

# Finite, so that a row without any visible key so far gets weights of exp(0), not NaN. The first visible key rescales
# them to 0.
MASKED = -1e30


def attend_tiles(refs: Refs, spec: Spec) -> None:
    """Processes tiles core, core + cores, core + 2*cores, ...: single tiles first, then chunk tiles."""
    copies = Copies(refs, spec)
    kernel = _Kernel(refs, spec, copies)
    core = pl.program_id(0)
    num_single, num_tiles = refs.scalars[NUM_SINGLE_TILES], refs.scalars[NUM_TILES]
    num_mine = pl.cdiv(num_tiles - core, spec.cores)
    num_mine_single = pl.cdiv(num_single - core, spec.cores)

    @pl.when(core == 0)
    def _() -> None:
        rows = pl.ds(0, copies.zero_rows)
        refs.out_buffer[rows] = jnp.zeros((copies.zero_rows, *refs.out_buffer.shape[1:]), refs.out_buffer.dtype)
        copies.copy_zeros("start")

    @pl.when(num_mine > 0)
    def _() -> None:
        # Values that are not fetched get weights of zero, but zero times previous memory contents may be NaN.
        def blank(c: jax.Array, _: None) -> None:
            for buffer in range(2):
                for ref in refs.value_buffers:
                    ref[buffer, c] = jnp.zeros(ref.shape[2:], ref.dtype)

        lax.fori_loop(0, spec.piece, blank, None)
        refs.q_single[...] = jnp.zeros_like(refs.q_single)
        copies.copy_tables(core, 0, "start")
        copies.copy_queries(core, "start")
        copies.copy_tables(core, 0, "wait")
        copies.copy_keys(core, 0, 0, 0, "start")

    pl.when(core == 0)(lambda: copies.copy_zeros("wait"))

    @pl.when(num_mine > 0)
    def _() -> None:
        def tile(ordinal: jax.Array, buffer: jax.Array, *, single: bool) -> jax.Array:
            return kernel.attend_tile(core + ordinal * spec.cores, ordinal % 2, buffer, single=single)

        buffer = lax.fori_loop(0, num_mine_single, lambda n, buffer: tile(n, buffer, single=True), jnp.int32(0))
        if spec.has_chunks:
            lax.fori_loop(num_mine_single, num_mine, lambda n, buffer: tile(n, buffer, single=False), buffer)
        copies.copy_results(core + (num_mine - 1) * spec.cores, "wait")


class _Kernel:
    """The arithmetic of a tile; letters as in `Copies`."""

    def __init__(self, refs: Refs, spec: Spec, copies: Copies) -> None:
        self.refs, self.spec, self.copies = refs, spec, copies

    def attend_tile(self, i: jax.Array, tables: jax.Array, buffer: jax.Array, *, single: bool) -> jax.Array:
        """Computes tile i, whose block tables and first piece have been requested; returns the next buffer."""
        refs, spec = self.refs, self.spec
        following = i + spec.cores
        has_following = following < refs.scalars[NUM_TILES]
        num_pieces = self.copies.num_pieces(i, single=single)

        self.copies.copy_queries(i, "wait")
        self.load_queries(single=single)

        @pl.when(has_following)
        def _() -> None:
            self.copies.copy_tables(following, 1 - tables, "start")
            self.copies.copy_queries(following, "start")

        def piece(r: jax.Array, buffer: jax.Array) -> jax.Array:
            @pl.when(r + 1 < num_pieces)
            def _() -> None:
                self.copies.copy_keys(i, r + 1, 1 - buffer, tables, "start")

            @pl.when((r + 1 == num_pieces) & has_following)
            def _() -> None:
                self.copies.copy_tables(following, 1 - tables, "wait")
                self.copies.copy_keys(following, 0, 1 - buffer, 1 - tables, "start")

            self.copies.copy_keys(i, r, buffer, tables, "wait")
            self.blank_unseen_values(i, r, buffer, single=single)
            (self.attend_singles if single else self.attend_chunk)(i, r, buffer)
            return 1 - buffer

        buffer = lax.fori_loop(0, num_pieces, piece, buffer)

        @pl.when(i >= spec.cores)
        def _() -> None:
            self.copies.copy_results(i - spec.cores, "wait")

        self.store_results(single=single)
        self.copies.copy_results(i, "start")
        return buffer

    def blank_unseen_values(self, i: jax.Array, r: jax.Array, buffer: jax.Array, *, single: bool) -> None:
        """Zeroes values in fetched blocks that are visible to no query of the tile."""
        spec, (values, *scales) = self.spec, self.refs.value_buffers
        for j in range(spec.sequences if single else 1):
            first, end = self.copies.key_range(i, j)
            start, blocks = self.copies.first_block(i, r, j), spec.share if single else spec.piece
            borders = [(end, "end")] + ([(first, "first")] if spec.has_window else [])
            for key, kind in borders:
                block, offset = key >> spec.block_bits, key & (spec.block_size - 1)

                @pl.when((block >= start) & (block < start + blocks) & (offset > 0))
                def _(
                    j: int = j,
                    start: jax.Array = start,
                    block: jax.Array | int = block,
                    offset: jax.Array | int = offset,
                    kind: str = kind,
                ) -> None:
                    at = (buffer, j * spec.share + block - start)
                    for ref in ([values] if spec.zero_values else []) + scales:
                        row = lax.broadcasted_iota(jnp.int32, ref.shape[2:], 1)
                        seen = row < offset if kind == "end" else row >= offset
                        old = ref[at].astype(jnp.float32)
                        ref[at] = jnp.where(seen, old, 0.0).astype(ref.dtype)

    def load_queries(self, *, single: bool) -> None:
        """Groups rows by KV head and resets the running sums."""
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
        """Calls `do` with the first query of each slice of a chunk tile. Slices keep the unrolled transposition small."""
        size = self.spec.slice
        lax.fori_loop(0, self.spec.queries // size, lambda n, _: do(pl.multiple_of(n * size, size)), None)

    def attend_singles(self, i: jax.Array, r: jax.Array, buffer: jax.Array) -> None:
        refs, spec = self.refs, self.spec
        for j in range(spec.sequences):
            position = refs.position[self.copies.member(i, j)]
            first_key = self.copies.first_block(i, r, j) * spec.block_size
            first, count = j * spec.share, spec.share
            blocks = pl.ds(first, count)
            for h in range(spec.num_kv_heads):
                n = j * spec.num_kv_heads + h
                refs.top_single[n], refs.total_single[n], refs.acc_single[n] = self.attend(
                    refs.q_single[n],
                    *self.keys_and_values(buffer, blocks, h),
                    *self.scales(buffer, first, count, h),
                    (refs.top_single[n], refs.total_single[n], refs.acc_single[n]),
                    query_position=position,
                    first_key=first_key,
                    slopes=None if refs.slopes is None else refs.slopes[h],
                    masked=True,
                )

    def attend_chunk(self, i: jax.Array, r: jax.Array, buffer: jax.Array) -> None:
        refs, spec = self.refs, self.spec
        g, q = spec.group, spec.queries
        e = self.copies.member(i, 0)
        position = refs.position[e]
        first_key = self.copies.first_block(i, r, 0) * spec.block_size
        last_key = first_key + spec.piece * spec.block_size - 1
        # If every query sees every key, no positions are compared.
        all_seen = last_key <= position
        if spec.has_window:
            all_seen &= first_key > position + q - 1 - refs.scalars[WINDOW]

        def attend_head(h: jax.Array, first: jax.Array | int, count: int, masked: bool) -> None:
            """Attends to `count` blocks of the piece, starting at block `first`."""
            heads = pl.ds(h * g, g)
            blocks = pl.ds(first, count)
            query_position = position + lax.broadcasted_iota(jnp.int32, (g, q, 1), 1).reshape(g * q, 1)
            slopes = None
            if refs.slopes is not None:
                slopes = jnp.broadcast_to(refs.slopes[h][:g, None], (g, q, LANES)).reshape(g * q, LANES)
            state = [ref[heads].reshape(g * q, -1) for ref in (refs.top_chunk, refs.total_chunk, refs.acc_chunk)]
            state = self.attend(
                refs.q_chunk[heads].reshape(g * q, -1),
                *self.keys_and_values(buffer, blocks, h),
                *self.scales(buffer, first, count, h),
                state,
                query_position=query_position,
                first_key=first_key + first * spec.block_size,
                slopes=slopes,
                masked=masked,
            )
            for ref, new in zip((refs.top_chunk, refs.total_chunk, refs.acc_chunk), state, strict=True):
                ref[heads] = new.reshape(g, q, -1)

        @pl.when(all_seen)
        def _() -> None:
            lax.fori_loop(0, spec.num_kv_heads, lambda h, _: attend_head(h, 0, spec.piece, False), None)

        @pl.when(jnp.logical_not(all_seen))
        def _() -> None:
            # In halves, because the diagonal may make one of them unnecessary.
            count = spec.piece // 2 if spec.piece * spec.block_size >= 2 * LANES and spec.piece > 1 else spec.piece

            def attend_part(n: jax.Array, _: None) -> None:
                first = n * count
                key = first_key + first * spec.block_size
                some_seen = key <= position + q - 1
                if spec.has_window:
                    some_seen &= key + count * spec.block_size > position + 1 - refs.scalars[WINDOW]

                @pl.when(some_seen)
                def _() -> None:
                    lax.fori_loop(0, spec.num_kv_heads, lambda h, _: attend_head(h, first, count, True), None)

            lax.fori_loop(0, spec.piece // count, attend_part, None)

    def keys_and_values(self, buffer: jax.Array, blocks: Any, h: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """A head's keys and values in some blocks, [C*B, W] each.

        Without a cache of values, values are the first numbers of their keys: the same rows.
        Rows of a packed cache are both: queries are zero where such a row has its value, and of the result only the part
        where values are is used. The products have 128 numbers on either side, as they have with heads of 128.
        """

        def rows(ref: Ref) -> jax.Array:  # [C, B, W] -> [C*B, W]: blocks are stored head by head, so this moves nothing
            return ref[buffer, blocks, h].reshape(-1, self.spec.width).astype(self.spec.product_dtype)

        keys = rows(self.refs.k_buffer)
        return keys, keys if self.refs.v_buffer is None else rows(self.refs.v_buffer)

    def scales(
        self, buffer: jax.Array, first: jax.Array | int, count: int, h: int | jax.Array
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """[1, C*B] each, the scales of a head's keys and values in some blocks; None if there are none."""
        refs = self.refs

        def rows(ref: Ref, row: int | jax.Array) -> jax.Array:
            return jnp.concatenate([ref[buffer, first + c, pl.ds(row, 1)] for c in range(count)], axis=1)

        if refs.k_scale_buffer is None:
            return None, None
        if self.spec.packed:
            return rows(refs.k_scale_buffer, 2 * h), rows(refs.k_scale_buffer, 2 * h + 1)
        keys = rows(refs.k_scale_buffer, h)
        return keys, keys if refs.v_scale_buffer is None else rows(refs.v_scale_buffer, h)

    def attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        key_scales: jax.Array | None,
        value_scales: jax.Array | None,
        state: Sequence[jax.Array],
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
            queries.astype(keys.dtype),
            keys,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=spec.precision,
        )  # [R, J]
        if key_scales is not None:
            scores = scores * key_scales
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
        # One sum per lane: they are added up once, when the tile is finished.
        total = total * keep
        for start in range(0, num_keys, LANES):
            total = total + weights[:, start : start + LANES]
        if value_scales is not None:
            weights = weights * value_scales
        weighted = jnp.dot(
            weights.astype(values.dtype), values, preferred_element_type=jnp.float32, precision=spec.precision
        )
        return new_top, total, acc * self.across(keep, acc.shape[1]) + weighted

    def across(self, rows: jax.Array, width: int) -> jax.Array:
        """[R, LANES], constant along each row -> [R, width]."""
        return jnp.concatenate([rows] * (width // LANES), axis=1)

    def store_results(self, *, single: bool) -> None:
        """Stores acc / total, with the sinks included in the total, as [queries, H, D]."""
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
                refs.acc_chunk[heads] = self.normalized(top, total, acc, sinks).reshape(g, q, -1)

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
                result = self.normalized(refs.top_single[n], refs.total_single[n], refs.acc_single[n], sinks)
                heads.append(result[:g])
            refs.out_buffer[j] = jnp.concatenate(heads, axis=0).astype(refs.out_buffer.dtype)

    def normalized(self, top: jax.Array, total: jax.Array, acc: jax.Array, sinks: jax.Array | None) -> jax.Array:
        total = jnp.sum(total, axis=1, keepdims=True)  # [R, 1]
        if sinks is not None:
            base = jnp.maximum(top, sinks)[:, :1]
            keep = jnp.exp(top[:, :1] - base)
            total, acc = total * keep + jnp.exp(sinks[:, :1] - base), acc * keep
        return acc / total
