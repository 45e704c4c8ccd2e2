"""Attention to the keys that an indexer chooses for each query (DeepSeek Sparse Attention, DeepSeek-V3.2), in plain XLA.

The latent cache of `ragged_attention` holds one head, and an index key rides beside each latent:

    key row    [ latent | rotated part | 0 ]         value row    [ latent | index key | 0 ]

so blocks, tables and prefixes are those of any other model. `choose` scores all keys of a sequence for a query and returns
the positions of the best; `attend` reads only those. Both compute a few tokens at a time and have fixed shapes: nothing as
large as a context is ever materialized, and trip counts come from the contexts in the batch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pytree import pytree, static
from pallas_kernels.ragged_attention.arguments import CacheLayer, RaggedIndex

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["IndexQueries", "LatentCache", "SparseTokens", "attend", "choose", "sparse_tokens"]

_TOKENS = 8  # computed together: the latents of 8 queries that choose 2,048 tokens are 20 MiB in bfloat16
_KEYS = 2048  # scored together

# Without HIGHEST an accelerator would round float32 operands; those of 16 bits are multiplied as they are.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@pytree
class SparseTokens:
    """The tokens of a step that attend to chosen keys; made once for all layers by `sparse_tokens`."""

    tokens: Int[Array, " padded"]
    """Their numbers in order, followed by T; a multiple of what is computed together."""
    count: Int[Array, ""]
    sequences: Int[Array, " T"]
    """The sequence of each token."""
    positions: Int[Array, " T"]
    """The position of each token in its sequence."""


@pytree
class IndexQueries:
    """What the indexer asks for each token: the score of a key k is the sum over heads of weight * relu(query . k)."""

    queries: Float[Array, "T I D"]
    weights: Float[Array, "T I"]
    """float32, with all constant factors."""


@pytree
class LatentCache:
    """One layer of a cache of latents and index keys, and the tables of the sequences in it."""

    k: Float[Array, "LN 1 B _"]
    v: Float[Array, "LN 1 B D"] | None
    """None: the rows of `k` are [key row | value row]."""
    tables: Int[Array, "S M"]
    layer: CacheLayer
    rank: int = static()
    """Size of a latent, after which the index key begins."""

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    def blocks(self) -> Int[Array, "S M"]:
        """The tables, with blocks of the whole pool."""
        return self.layer.first_block + jnp.clip(self.tables, 0, self.layer.num_blocks - 1)

    def columns(self, blocks_or_rows: Int[Array, "*shape"], first: int, width: int, *, of_values: bool, whole_blocks: bool):
        """Columns [first, first + width) of rows, or of whole blocks [*shape, B, width]."""
        pool = self.k if self.v is None or not of_values else self.v
        if self.v is None and of_values:
            first += pool.shape[-1] // 2
        num_blocks, _, size, width_of_row = pool.shape
        if whole_blocks:
            flat, sizes, kept = pool.reshape(num_blocks, size, width_of_row), (1, size, width), (size, width)
            offsets = (blocks_or_rows.ndim, blocks_or_rows.ndim + 1)
        else:
            flat, sizes, kept = pool.reshape(num_blocks * size, width_of_row), (1, width), (width,)
            offsets = (blocks_or_rows.ndim,)

        def of_columns(flat: jax.Array, places: jax.Array) -> jax.Array:
            # A gather of the columns only: a slice of gathered rows would be a second array.
            starts = jnp.stack([places, *[jnp.zeros_like(places)] * (len(kept) - 1)], axis=-1)
            starts = jnp.concatenate([starts, jnp.full((*places.shape, 1), first, jnp.int32)], axis=-1)
            return lax.gather(
                flat,
                starts,
                lax.GatherDimensionNumbers(
                    offset_dims=offsets, collapsed_slice_dims=(0,), start_index_map=tuple(range(flat.ndim))
                ),
                slice_sizes=sizes,
                mode=lax.GatherScatterMode.CLIP,
            )

        def of_rows(flat: jax.Array, places: jax.Array) -> jax.Array:
            # For columns of blocks XLA would copy the pool into another layout in every layer. These rows go into VMEM.
            return jnp.take(flat, places, axis=0, mode="clip")[..., first : first + width]

        return lax.platform_dependent(flat, blocks_or_rows, tpu=of_rows, default=of_columns)


def sparse_tokens(index: RaggedIndex, positions: Int[Array, " T"], num_chosen: int) -> SparseTokens:
    """The tokens of a step that have more than `num_chosen` keys to attend to, themselves included."""
    num_tokens, num_sequences = positions.shape[0], index.context_lens.shape[0]
    place = jnp.arange(num_tokens, dtype=jnp.int32)
    sequences = jnp.sum(index.query_starts[None, 1:] <= place[:, None], axis=1, dtype=jnp.int32)
    chooses = (positions >= num_chosen) & (place < index.query_starts[-1])
    order = jnp.where(chooses, place, num_tokens)
    return SparseTokens(
        tokens=jnp.pad(jnp.sort(order), (0, -num_tokens % _TOKENS), constant_values=num_tokens),
        count=jnp.sum(chooses, dtype=jnp.int32),
        sequences=jnp.minimum(sequences, num_sequences - 1),
        positions=positions,
    )


def choose(asked: IndexQueries, cache: LatentCache, tokens: SparseTokens, chosen: Int[Array, "T C"]) -> Int[Array, "T C"]:
    """`chosen` with the positions of the C best keys of each of `tokens`, best first; of equal scores, the lowest position.

    So the result does not depend on how keys or tokens are divided. Every such token must have more than C keys.
    """
    _, _, dim = asked.queries.shape
    num_chosen, size = chosen.shape[1], cache.block_size
    blocks = cache.blocks()
    piece_blocks = min(max(1, _KEYS // size), blocks.shape[1])
    piece = piece_blocks * size
    # Whole pieces, so that a slice of a table never moves.
    blocks = jnp.pad(blocks, ((0, 0), (0, -blocks.shape[1] % piece_blocks)))

    def of_tile(tile: jax.Array, chosen: jax.Array) -> jax.Array:
        numbers, rows = _tile(tokens, tile)
        positions, sequences = tokens.positions[rows], tokens.sequences[rows]
        queries = asked.queries[rows].astype(cache.k.dtype)  # [tile, I, D]
        weights = asked.weights[rows]
        own = blocks[sequences]  # [tile, M]

        def separate(first: jax.Array) -> jax.Array:
            """Scores [tile, I, piece] of the keys in blocks of a sequence for each token."""
            of_piece = lax.dynamic_slice_in_dim(own, first * piece_blocks, piece_blocks, axis=1)
            keys = cache.columns(of_piece, cache.rank, dim, of_values=True, whole_blocks=True)
            return _einsum("tid,tkd->tik", queries, keys.reshape(keys.shape[0], piece, dim))

        def shared(first: jax.Array) -> jax.Array:
            """The same if all tokens are of one sequence, whose keys are then read once."""
            of_piece = lax.dynamic_slice_in_dim(own[0], first * piece_blocks, piece_blocks)
            keys = cache.columns(of_piece, cache.rank, dim, of_values=True, whole_blocks=True)
            return _einsum("tid,kd->tik", queries, keys.reshape(piece, dim))

        def either(first: jax.Array) -> jax.Array:
            return lax.cond(jnp.all(sequences == sequences[0]), shared, separate, first)

        def of_piece(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # On a CPU always in the same way: there a product of another shape may round differently.
            scores = lax.platform_dependent(i, cpu=separate, default=either)
            scores = jnp.sum(jnp.maximum(scores, 0.0) * weights[:, :, None], axis=1)  # [tile, piece]
            places = jnp.broadcast_to(i * piece + jnp.arange(piece, dtype=jnp.int32)[None, :], scores.shape)
            scores = jnp.where(places <= positions[:, None], scores, -jnp.inf)
            # What was found before has lower positions, and of equal numbers top_k takes the first.
            scores, places = (jnp.concatenate(pair, axis=1) for pair in zip(best, (scores, places), strict=True))
            scores, order = lax.top_k(scores, num_chosen)
            return scores, jnp.take_along_axis(places, order, axis=1)

        count = numbers.shape[0]
        nothing = jnp.full((count, num_chosen), -jnp.inf), jnp.zeros((count, num_chosen), jnp.int32)
        pieces = jnp.max(jnp.where(numbers < tokens.positions.shape[0], positions, 0)) // piece + 1
        best = lax.fori_loop(0, pieces, of_piece, nothing)[1]
        return chosen.at[numbers].set(best, mode="drop")

    return lax.fori_loop(0, _num_tiles(tokens), of_tile, chosen)


def attend(
    q: Float[Array, "T H D"],
    cache: LatentCache,
    tokens: SparseTokens,
    chosen: Int[Array, "T C"],
    out: Float[Array, "T H D"],
    *,
    scale: float,
) -> Float[Array, "T H D"]:
    """`out` with the sums of latents of each of `tokens` over its chosen positions, followed by zeros.

    Softmax and sums are in float32.
    """
    width, size = q.shape[-1], cache.block_size
    blocks = cache.blocks()

    def of_tile(tile: jax.Array, out: jax.Array) -> jax.Array:
        numbers, rows = _tile(tokens, tile)
        places = chosen[rows]  # [tile, C]
        own = jnp.take_along_axis(blocks[tokens.sequences[rows]], places // size, axis=1)
        keys = cache.columns(own * size + places % size, 0, width, of_values=False, whole_blocks=False)  # [tile, C, D]
        queries = (q[rows].astype(jnp.float32) * scale).astype(keys.dtype)
        weights = jax.nn.softmax(_einsum("thd,tcd->thc", queries, keys), axis=-1)
        latents = keys[:, :, : cache.rank]
        sums = _einsum("thc,tcd->thd", weights.astype(keys.dtype), latents)
        sums = jnp.pad(sums, ((0, 0), (0, 0), (0, width - cache.rank)))
        return out.at[numbers].set(sums.astype(out.dtype), mode="drop")

    return lax.fori_loop(0, _num_tiles(tokens), of_tile, out)


def _num_tiles(tokens: SparseTokens) -> Int[Array, ""]:
    return -(-tokens.count // _TOKENS)


def _tile(tokens: SparseTokens, tile: Int[Array, ""]) -> tuple[Int[Array, " tile"], Int[Array, " tile"]]:
    """The numbers of some tokens, T for none, and rows to read for them."""
    numbers = lax.dynamic_slice_in_dim(tokens.tokens, tile * _TOKENS, _TOKENS)
    # Those of no token read the first one's, so that a tile has as few sequences as possible.
    return numbers, jnp.where(numbers < tokens.positions.shape[0], numbers, numbers[0])
