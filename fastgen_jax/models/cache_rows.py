"""Heads of two sizes in one cache.

A row of the cache, [K, B, D] for a block, has room for the larger heads. Smaller ones lie side by side in the D numbers of a
head, and layers that fill only a part of the K heads share a row. Gemma 4 31B has 4 KV heads of 512 numbers in layers that
attend to all tokens, and 16 heads of 256 in the others:

    heads of a row         0         1         2         3         4         5         6         7
    one layer              h0 h1     h2 h3     h4 h5     h6 h7     h8 h9     h10 h11   h12 h13   h14 h15
    two layers, a and b    a0        a1        a2        a3        b0        b1        b2        b3

A query of h0 is zero where h1 lies, and of its result only the part of h0 is kept, so that kernels know nothing of it. They
see the blocks of a shared row as blocks of K / 2 heads, of which block 2 b belongs to layer a and block 2 b + 1 to layer b.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention import Attention, CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.quantized import Cache

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def side_by_side(
    q: Float[Array, "T H D"], k: Float[Array, "T K D"], v: Float[Array, "T K D"], count: int
) -> tuple[Float[Array, "T H nD"], Float[Array, "T Kn nD"], Float[Array, "T Kn nD"]]:
    """`count` heads of keys and values as one, and queries with zeros where the others are."""
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    of_heads = q.reshape(num_tokens, num_kv_heads // count, count, num_heads // num_kv_heads, dim)
    nothing = [(0, 0)] * 3
    placed = [jnp.pad(of_heads[:, :, i], (*nothing, (i * dim, (count - 1 - i) * dim))) for i in range(count)]
    k, v = (part.reshape(num_tokens, num_kv_heads // count, count * dim) for part in (k, v))
    return jnp.stack(placed, axis=2).reshape(num_tokens, num_heads, count * dim), k, v


def own_part(out: Float[Array, "T H nD"], num_kv_heads: int, count: int) -> Float[Array, "T H D"]:
    """What belongs to each query, of results for `count` heads side by side."""
    num_tokens, num_heads, width = out.shape
    of_heads = out.reshape(num_tokens, num_kv_heads // count, count, num_heads // num_kv_heads, count, width // count)
    own = [of_heads[:, :, i, :, i] for i in range(count)]
    return jnp.stack(own, axis=2).reshape(num_tokens, num_heads, width // count)


def for_share(index: RaggedIndex, share: int, sharing: int, *, block_size: int) -> RaggedIndex:
    """`index` for a layer that is number `share` of the `sharing` layers of a row."""
    if sharing == 1:
        return index
    blocks, places = jnp.divmod(index.kv_slots, block_size)
    return replace(
        index,
        kv_slots=(blocks * sharing + share) * block_size + places,
        block_tables=index.block_tables * sharing + share,
    )


def of_shared_rows(attend: Attention) -> Attention:
    """`attend` for layers that may share rows; with fewer heads than a row has, an index is one of `for_share`."""

    def shared(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_cache: Cache,
        v_cache: Cache | None,
        index: RaggedIndex,
        layer: CacheLayer,
        scoring: Scoring,
    ) -> tuple[jax.Array, Cache, Cache | None]:
        sharing = k_cache.shape[1] // k.shape[1]
        if sharing == 1:
            return attend(q, k, v, k_cache, v_cache, index, layer, scoring)
        layer = replace(layer, num_blocks=layer.num_blocks * sharing)
        keys, values = jax.tree.map(lambda pool: divided_rows(pool, sharing), (k_cache, v_cache))
        out, *changed = attend(q, k, v, keys, values, index, layer, scoring)
        k_cache, v_cache = jax.tree.map(lambda pool, like: pool.reshape(like.shape), tuple(changed), (k_cache, v_cache))
        return out, k_cache, v_cache

    return shared


def divided_rows(pool: jax.Array, sharing: int) -> jax.Array:
    """The blocks [LN, K, ...] of a cache as those of one of `sharing` layers, [LN * sharing, K / sharing, ...]."""
    return pool.reshape(pool.shape[0] * sharing, pool.shape[1] // sharing, *pool.shape[2:])
