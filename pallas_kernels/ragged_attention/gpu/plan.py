"""Divides the GPU kernels' work into tiles, the same in all layers with one window, and combines the results of pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.pytree import pytree
from pallas_kernels.ragged_attention.arguments import RaggedIndex
from pallas_kernels.ragged_attention.gpu.softmax_tile import GRANULE, NUM_COLUMNS, Spec
from pallas_kernels.ragged_attention.gpu.tile_sizes import GpuTiles

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


# Columns of `GpuPlan.merge`: where the result of a token is, its first tile, its number of tiles, and the row of its first
# head in them.
PLACE, TILE, TILES, FIRST_HEAD = range(4)
UNUSED, SINGLE, CHUNK = range(3)
_MOST_INDEPENDENT = 512  # pieces: their float32 results are 32 MiB for 8 KV heads of 128


@pytree
class GpuPlan:
    """The tiles of both kernels, and where the result of each token is.

    With a `kind`, it is one of several plans, whose arrays are stacked: kernels read theirs where it is, since a slice would
    be one more kernel in every layer.
    """

    pieces: Int[Array, "rows columns"]
    """Work list of the kernel for pieces of the contexts of single queries."""
    first_piece: Int[Array, " S"]
    num_pieces: Int[Array, " S"]
    chunks: Int[Array, "rows columns"] | None
    """Work list of the kernel for chunks of several queries; None for a step of one token, which has none."""
    tile: Int[Array, " T"] | None
    """The chunk tile of each token, and the row of its first head in it."""
    row: Int[Array, " T"] | None
    merge: Int[Array, "T columns"]
    """Where `merge` finds the result of each token."""
    sequence: Int[Array, " T"]
    is_single: Bool[Array, " T"]
    """Whether the token is the only one of its chunk."""
    is_used: Bool[Array, " T"]
    """Whether the token belongs to a chunk."""
    tables: Int[Array, "kinds S M"] | None = None
    slots: Int[Array, "kinds T"] | None = None
    """`RaggedIndex.block_tables` and `kv_slots` of all kinds, if they differ."""
    kind: Int[Array, ""] | None = None

    def alone(self) -> GpuPlan:
        """The plan with its own parts of the arrays."""
        if self.kind is None:
            return self
        kind, plan = self.kind, dataclasses.replace(self, tables=None, slots=None, kind=None)
        return jax.tree.map(lambda stacked: stacked[kind], plan)


def stack_plans(plans: Sequence[GpuPlan], indices: Sequence[RaggedIndex]) -> list[GpuPlan]:
    """The plans of several kinds of layers, as parts of one; `indices` are those that they were made for."""
    if len(plans) == 1:
        return list(plans)
    whole = jax.tree.map(lambda *parts: jnp.stack(parts), *plans)
    if any(index.block_tables is not indices[0].block_tables for index in indices):
        whole = dataclasses.replace(whole, tables=jnp.stack([index.block_tables for index in indices]))
    if any(index.kv_slots is not indices[0].kv_slots for index in indices):
        whole = dataclasses.replace(whole, slots=jnp.stack([index.kv_slots for index in indices]))
    return [dataclasses.replace(whole, kind=jnp.int32(kind)) for kind in range(len(plans))]


def plan_step(
    index: RaggedIndex,
    window: Int[Array, ""],
    *,
    num_tokens: int,
    num_kv_heads: int,
    tiles: GpuTiles,
    specs: tuple[Spec, Spec],
    independent: bool = False,
) -> GpuPlan:
    """The plan of a step; `specs` are those of the kernels for pieces and for chunks, `independent` as for `plan_pieces`."""
    query_starts, context_lens = index.query_starts, index.context_lens
    lengths = query_starts[1:] - query_starts[:-1]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.sum(query_starts[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, context_lens.shape[0] - 1)
    pieces, first_piece, num_pieces = plan_pieces(
        query_starts,
        context_lens,
        window,
        num_kv_heads=num_kv_heads,
        tiles=tiles,
        spec=specs[0],
        independent=independent,
    )
    chunks = tile = row = None
    if num_tokens > 1:
        chunks, tile, row = plan_chunks(
            query_starts, context_lens, window, num_tokens=num_tokens, sequence=sequence, spec=specs[1]
        )
    is_single = lengths[sequence] == 1
    is_used = (token >= query_starts[0]) & (token < query_starts[-1])
    single = [first_piece[sequence], num_pieces[sequence], token * specs[0].group % GRANULE]
    places = jnp.stack([jnp.full_like(token, SINGLE), *single], axis=1)
    if tile is not None and row is not None:
        chunk = jnp.stack([jnp.full_like(token, CHUNK), tile, jnp.ones_like(tile), row], axis=1)
        places = jnp.where(is_single[:, None], places, chunk)
    return GpuPlan(
        pieces=pieces,
        first_piece=first_piece,
        num_pieces=num_pieces,
        chunks=chunks,
        tile=tile,
        row=row,
        merge=jnp.where(is_used[:, None], places, UNUSED),
        sequence=sequence,
        is_single=is_single,
        is_used=is_used,
    )


def _bounds(num_sequences: int, num_kv_heads: int, tiles: GpuTiles) -> tuple[int, int]:
    """How many pieces are wanted, and the most that a sequence has, so that their results can be gathered and combined."""
    wanted = max(1, tiles.pieces // num_kv_heads)
    return wanted, max(1, min(wanted, max(8, 1024 // num_sequences)))


def most_pieces(num_sequences: int, num_kv_heads: int, tiles: GpuTiles) -> int:
    """The maximum number of pieces of a sequence."""
    return _bounds(num_sequences, num_kv_heads, tiles)[1]


def _first_key(position: jax.Array, window: jax.Array, spec: Spec) -> jax.Array:
    """The first key to fetch for a query: the start of its window, rounded down to the unit of one copy."""
    unit = min(spec.keys, spec.block_size)
    return jnp.maximum(position - window + 1, 0) // unit * unit


def _work_list(active: jax.Array, columns: list[jax.Array]) -> jax.Array:
    columns = [jnp.broadcast_to(column, active.shape) for column in columns]
    assert len(columns) == NUM_COLUMNS
    work = jnp.where(active[:, None], jnp.stack(columns, axis=1), 0)
    count = jnp.full((1, NUM_COLUMNS), jnp.sum(active, dtype=jnp.int32))
    return jnp.concatenate([work, count])


def plan_pieces(
    query_starts: Int[Array, " starts"],
    context_lens: Int[Array, " S"],
    window: Int[Array, ""],
    *,
    num_kv_heads: int,
    tiles: GpuTiles,
    spec: Spec,
    independent: bool = False,
) -> tuple[Int[Array, "rows columns"], Int[Array, " S"], Int[Array, " S"]]:
    """Splits the contexts of single queries into pieces of about the same size, enough to keep the device busy.

    If `independent`, the pieces of a sequence depend on its own context alone: as many as `min_piece` allows, but not so
    many that all sequences together could have more than `_MOST_INDEPENDENT`.

    Returns:
      the work list; the first piece and the number of pieces of each sequence, i32[S].
    """
    num_sequences = context_lens.shape[0]
    wanted, most = _bounds(num_sequences, num_kv_heads, tiles)
    lengths = query_starts[1:] - query_starts[:-1]
    first = _first_key(context_lens - 1, window, spec)
    steps = jnp.where((lengths == 1) & (context_lens > 0), -(-(context_lens - first) // spec.keys), 0)
    share = jnp.int32(max(1, tiles.min_piece // spec.keys))
    if independent:
        most = max(1, min(most, _MOST_INDEPENDENT // num_sequences))
        wanted = num_sequences * (most - 1)
    else:
        share = jnp.maximum(share, -(-jnp.sum(steps, dtype=jnp.int32) // wanted))
    share = jnp.maximum(share, -(-steps // most))  # steps per piece, i32[S]
    pieces = -(-steps // share)
    share = -(-steps // jnp.maximum(pieces, 1))  # all pieces of a sequence have the same size
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    starts = ends - pieces

    i = jnp.arange(wanted + num_sequences, dtype=jnp.int32)
    s = jnp.minimum(jnp.sum(ends[None, :] <= i[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    piece = i - starts[s]
    begin = first[s] + piece * share[s] * spec.keys
    end = jnp.minimum(begin + share[s] * spec.keys, context_lens[s])
    work = _work_list(
        i < ends[-1],
        [
            s,
            query_starts[s] * spec.group,
            context_lens[s] - 1,
            begin,
            end,
            window,
            (piece == 0).astype(jnp.int32),
        ],
    )
    return work, starts, pieces


def plan_chunks(
    query_starts: Int[Array, " starts"],
    context_lens: Int[Array, " S"],
    window: Int[Array, ""],
    *,
    num_tokens: int,
    sequence: Int[Array, " T"],
    spec: Spec,
) -> tuple[Int[Array, "rows columns"], Int[Array, " T"], Int[Array, " T"]]:
    """Splits chunks of several tokens into tiles of queries. Later tiles of a chunk, which see more keys, come first.

    Returns:
      the work list; for each token its tile and the row of its first head in that tile, i32[T] each.
    """
    num_sequences = context_lens.shape[0]
    queries = spec.queries
    lengths = query_starts[1:] - query_starts[:-1]
    tiles = jnp.where(lengths > 1, -(-lengths // queries), 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    starts = ends - tiles

    i = jnp.arange(max(1, num_tokens // queries + min(num_sequences, num_tokens // 2)), dtype=jnp.int32)
    j = ends[-1] - 1 - i
    s = jnp.minimum(jnp.sum(ends[None, :] <= j[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    query = (j - starts[s]) * queries  # the tile's first query, relative to its chunk
    position = context_lens[s] - lengths[s] + query
    end = position + jnp.minimum(lengths[s] - query, queries)
    work = _work_list(
        j >= 0,
        [
            s,
            (query_starts[s] + query) * spec.group,
            position,
            _first_key(position, window, spec),
            end,
            window,
            jnp.ones_like(s),
        ],
    )
    query = jnp.arange(num_tokens, dtype=jnp.int32) - query_starts[sequence]
    tile = jnp.maximum(ends[-1] - 1 - starts[sequence] - query // queries, 0)
    row = query % queries * spec.group
    # A tile begins at a granule boundary, which may be before its first query.
    skipped = (jnp.arange(num_tokens, dtype=jnp.int32) * spec.group - row) % GRANULE
    return work, tile, row + skipped


def combine(
    partial: Float[Array, "tiles K R D"],
    lse: Float[Array, "tiles K R"],
    starts: Int[Array, " S"],
    pieces: Int[Array, " S"],
    rows: Int[Array, " S"],
    *,
    group: int,
    most: int,
) -> Float[Array, "S K G D"]:
    """Softmax-weighted sums over the pieces of each sequence, f32[S, K, G, D]; 0 for sequences without pieces.

    Args:
      partial: f32[tiles, K, R, D], each normalized over its own keys.
      lse: f32[tiles, K, R], log2 of the sum of exp2 of each tile's scores.
      starts, pieces: i32[S], the first piece of each sequence and its number of pieces, at most `most`.
      rows: i32[S], the row of the first of the `group` heads, the same in all pieces of a sequence.
    """
    j = jnp.arange(most, dtype=jnp.int32)[None, :]
    exists = (j < pieces[:, None])[:, :, None, None]  # [S, J, 1, 1]
    at = jnp.minimum(starts[:, None] + jnp.minimum(j, pieces[:, None] - 1), partial.shape[0] - 1)
    at = jnp.maximum(at, 0)
    head = jnp.arange(partial.shape[1], dtype=jnp.int32)[None, None, :, None]
    row = rows[:, None, None, None] + jnp.arange(group, dtype=jnp.int32)[None, None, None, :]
    at = at[:, :, None, None]
    scores = jnp.where(exists, lse[at, head, row], -jnp.inf)  # [S, J, K, G]
    top = jnp.max(scores, axis=1, keepdims=True)
    weights = jnp.where(exists, jnp.exp2(scores - top), 0.0)
    total = jnp.sum(weights, axis=1)
    # Select, because memory that no tile has written may hold NaN.
    values = jnp.where(exists[..., None], partial[at, head, row], 0.0)
    result = jnp.sum(weights[..., None] * values, axis=1)
    return result / jnp.where(total == 0.0, 1.0, total)[..., None]
