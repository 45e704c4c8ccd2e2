"""Packed attention in plain XLA, one tile of queries and one of keys at a time, and its derivative.

A tile of queries meets the tiles of keys from the start of its first sequence (or of its window) up to itself:

    tile of queries 3    keys | 0 | 1 | 2 | 3 |      sequences  a a a a b b b b b b b b c c c c
                                    ^...^...^        tokens     |   0   |   1   |   2   |   3   |

so the time is that of the sequences alone, not of T x T scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ragged_attention import Scoring

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Packed = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Scoring], jax.Array]
"""(q, k, v, query_starts, scoring) -> out"""

_TILE = 128  # tokens
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class _Tiles:
    """The inputs in float32 as tiles: queries [n, C, K, G, D], keys and values [n * C, K, D], C tokens in a tile."""

    def __init__(self, q: jax.Array, k: jax.Array, v: jax.Array, query_starts: jax.Array, scoring: Scoring) -> None:
        self.num_tokens, num_heads, self.head_dim = q.shape
        self.heads = (k.shape[1], num_heads // k.shape[1])  # K, G
        self.size = min(_TILE, self.num_tokens)
        self.count = -(-self.num_tokens // self.size)
        self.scoring = scoring
        self.queries = self.of_rows(q.reshape(self.num_tokens, *self.heads, self.head_dim))
        self.keys, self.values = (self.padded(x) for x in (k, v))
        token = jnp.arange(self.count * self.size, dtype=jnp.int32)
        # A token of padding is a sequence by itself.
        sequence = jnp.sum(query_starts[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
        starts = query_starts[jnp.minimum(sequence, query_starts.shape[0] - 1)]
        self.starts = jnp.where(token < query_starts[-1], starts, token).reshape(self.count, -1)

    def padded(self, x: jax.Array) -> jax.Array:
        """x [T, ...] in float32, padded with zeros to whole tiles."""
        padding = [(0, self.count * self.size - self.num_tokens)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x.astype(jnp.float32), padding)

    def of_rows(self, x: jax.Array) -> jax.Array:
        """x [T, ...] as [n, C, ...]."""
        return self.padded(x).reshape(self.count, self.size, *x.shape[1:])

    def rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `of_rows`, or of `padded`."""
        return x.reshape(self.count * self.size, *x.shape[2:])[: self.num_tokens]

    def first(self, i: jax.Array) -> jax.Array:
        """The first tile of keys that tile i of queries sees."""
        token = self.starts[i, 0]
        if self.scoring.sliding_window is not None:
            token = jnp.maximum(token, i * self.size - self.scoring.sliding_window + 1)
        return token // self.size

    def keys_at(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [C, K, D] of tile j."""
        one = lambda x: lax.dynamic_slice_in_dim(x, j * self.size, self.size)  # noqa: E731
        return one(self.keys), one(self.values)

    def scores(self, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of queries of tile i and keys of tile j: capped scores, scores (-inf where invisible), and distances.

        They are [K, G, C, C], [K, G, C, C] and [C, C], with queries before keys.
        """
        scoring = self.scoring
        capped = scoring.scale * _einsum("ckgd,jkd->kgcj", self.queries[i], self.keys_at(j)[0])
        if scoring.soft_cap is not None:
            capped = scoring.soft_cap * jnp.tanh(capped / scoring.soft_cap)
        offset = jnp.arange(self.size, dtype=jnp.int32)
        distance = (j - i) * self.size + offset[None, :] - offset[:, None]  # [query, key]
        is_visible = (distance <= 0) & (j * self.size + offset[None, :] >= self.starts[i][:, None])
        if scoring.sliding_window is not None:
            is_visible &= distance > -scoring.sliding_window
        scores = capped
        if scoring.alibi_slopes is not None:
            slopes = scoring.alibi_slopes.reshape(*self.heads, 1, 1)
            scores = scores + slopes * distance.astype(jnp.float32)[None, None]
        return capped, jnp.where(is_visible[None, None], scores, -jnp.inf), distance

    def sums(self, i: jax.Array, *, with_values: bool) -> tuple[jax.Array, jax.Array]:
        """For tile i: the weighted values [C, K, G, D], zeros unless `with_values`, and the log-sums of scores [K, G, C]."""
        shape = (*self.heads, self.size)

        def step(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = state
            scores = self.scores(i, j)[1]
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # -inf - -inf would be NaN
            weights = jnp.exp(scores - base[..., None])
            keep = jnp.exp(top - base)
            if with_values:
                acc = acc * keep[..., None] + _einsum("kgcj,jkd->kgcd", weights, self.keys_at(j)[1])
            return new_top, total * keep + jnp.sum(weights, axis=-1), acc

        if self.scoring.sinks is None:
            top, total = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        else:
            top = jnp.broadcast_to(self.scoring.sinks.reshape(*self.heads, 1), shape)
            total = jnp.ones(shape, jnp.float32)
        acc = jnp.zeros((*shape, self.head_dim if with_values else 0), jnp.float32)
        top, total, acc = lax.fori_loop(self.first(i), i + 1, step, (top, total, acc))
        return jnp.moveaxis(acc / total[..., None], 2, 0), top + jnp.log(total)


def packed_attention_tiles(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    query_starts: Int[Array, " bounds"],
    scoring: Scoring,
) -> Float[Array, "T H D"]:
    """See `packed_attention`."""
    tiles = _Tiles(q, k, v, query_starts, scoring)
    numbers = jnp.arange(tiles.count, dtype=jnp.int32)
    out = tiles.rows(lax.map(lambda i: tiles.sums(i, with_values=True)[0], numbers)).reshape(q.shape)
    is_used = jnp.arange(q.shape[0]) < query_starts[-1]
    return jnp.where(is_used[:, None, None], out, 0.0).astype(q.dtype)


def with_derivative(forward: Packed) -> Packed:
    """`forward` with a derivative in reverse mode that keeps only inputs and results."""
    attention = jax.custom_vjp(forward)
    attention.defvjp(lambda *inputs: ((out := forward(*inputs)), (*inputs, out)), _backward)
    return attention


def _backward(kept: tuple, out_gradient: jax.Array) -> tuple:
    q, k, v, query_starts, scoring, out = kept
    tiles = _Tiles(q, k, v, query_starts, scoring)
    is_used = jnp.arange(q.shape[0]) < query_starts[-1]
    out_gradient = jnp.where(is_used[:, None, None], out_gradient.astype(jnp.float32), 0.0)
    shape = (q.shape[0], *tiles.heads, tiles.head_dim)
    out_gradients = tiles.of_rows(out_gradient.reshape(shape))  # [n, C, K, G, D]
    inner = jnp.sum(out_gradients * tiles.of_rows(out.reshape(shape)), axis=-1)  # [n, C, K, G]
    inner = jnp.moveaxis(inner, 1, 3)  # [n, K, G, C]

    def of_queries(carry: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        log_sums = tiles.sums(i, with_values=False)[1]

        def of_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv, dslopes = carry
            keys, values = tiles.keys_at(j)
            capped, scores, distance = tiles.scores(i, j)
            weights = jnp.exp(scores - log_sums[..., None])
            dvalues = _einsum("kgcj,ckgd->jkd", weights, out_gradients[i])
            dscores = weights * (_einsum("ckgd,jkd->kgcj", out_gradients[i], values) - inner[i][..., None])
            if scoring.alibi_slopes is not None:
                dslopes = dslopes + jnp.sum(dscores * distance.astype(jnp.float32)[None, None], axis=(2, 3))
            if scoring.soft_cap is not None:
                dscores = dscores * (1.0 - jnp.square(capped / scoring.soft_cap))
            dscores = dscores * scoring.scale
            dkeys = _einsum("kgcj,ckgd->jkd", dscores, tiles.queries[i])
            dq = dq + _einsum("kgcj,jkd->ckgd", dscores, keys)
            return dq, _add_at(dk, j * tiles.size, dkeys), _add_at(dv, j * tiles.size, dvalues), dslopes

        dk, dv, dslopes, dsinks = carry
        dq = jnp.zeros(tiles.queries.shape[1:], jnp.float32)
        dq, dk, dv, dslopes = lax.fori_loop(tiles.first(i), i + 1, of_keys, (dq, dk, dv, dslopes))
        if scoring.sinks is not None:
            share = jnp.exp(scoring.sinks.reshape(*tiles.heads, 1) - log_sums)
            dsinks = dsinks - jnp.sum(share * inner[i], axis=-1)
        return (dk, dv, dslopes, dsinks), dq

    nothing = jnp.zeros(tiles.heads, jnp.float32)
    start = (jnp.zeros_like(tiles.keys), jnp.zeros_like(tiles.values), nothing, nothing)
    (dk, dv, dslopes, dsinks), dq = lax.scan(of_queries, start, jnp.arange(tiles.count, dtype=jnp.int32))
    of_scoring = dataclasses.replace(  # of the same structure, with all that is static
        scoring,
        rotation=None,  # these are rotated before
        sliding_window=None if scoring.sliding_window is None else _no_gradient(scoring.sliding_window),  # pyright: ignore
        alibi_slopes=None if scoring.alibi_slopes is None else dslopes.reshape(-1),
        sinks=None if scoring.sinks is None else dsinks.reshape(-1),
    )
    gradients = (tiles.rows(dq).reshape(q.shape), dk[: q.shape[0]], dv[: q.shape[0]])
    return (*(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), _no_gradient(query_starts), of_scoring)


def _add_at(x: jax.Array, start: jax.Array, more: jax.Array) -> jax.Array:
    old = lax.dynamic_slice_in_dim(x, start, more.shape[0])
    return lax.dynamic_update_slice_in_dim(x, old + more, start, axis=0)


def _no_gradient(x: jax.Array) -> np.ndarray:
    """The gradient with respect to integers."""
    return np.zeros(np.shape(x), jax.dtypes.float0)
