"""Attention between the patches of an image, in both directions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

_SCORES = 512 * 4096  # of each head that exist at the same time: with 16 heads they take 128 MiB
_LEAST_QUERIES = 64
_NOTHING = -1e30  # the score of a patch that is none: exp() of it is 0, unless all are


def score_bytes(num_patches: int, num_heads: int) -> int:
    """Bytes of the scores that exist at the same time."""
    return 4 * num_heads * num_patches * min(num_patches, _queries(num_patches))


def _queries(num_patches: int) -> int:
    return max(_LEAST_QUERIES, _SCORES // num_patches)


def attend_all(
    q: Float[Array, "n H D"], k: Float[Array, "n H D"], v: Float[Array, "n H D"], is_key: Bool[Array, " n"] | None = None
) -> Float[Array, "n H D"]:
    """Softmax attention of every row to all rows that are keys, in float32, for some hundred queries at a time."""
    count = q.shape[0]

    def some(queries: Float[Array, "queries H D"]) -> Float[Array, "queries H D"]:
        scores = jnp.einsum("qhd,khd->hqk", queries, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        if is_key is not None:
            scores = jnp.where(is_key[None, None, :], scores, _NOTHING)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("hqk,khd->qhd", shares, v, preferred_element_type=jnp.float32).astype(q.dtype)

    size = _queries(count)
    if count <= size:
        return some(q)
    padded = jnp.pad(q, ((0, -count % size), (0, 0), (0, 0)))
    return jax.lax.map(some, padded.reshape(-1, size, *q.shape[1:])).reshape(padded.shape)[:count]


def attend_within(
    q: Float[Array, "n H D"],
    k: Float[Array, "n H D"],
    v: Float[Array, "n H D"],
    is_key: Bool[Array, " n"],
    *,
    window: int,
) -> Float[Array, "n H D"]:
    """The same within each run of `window` rows, a divisor of n."""
    shape = (-1, window, *q.shape[1:])
    scores = jnp.einsum("wqhd,wkhd->whqk", q.reshape(shape), k.reshape(shape), preferred_element_type=jnp.float32)
    scores = jnp.where(is_key.reshape(-1, 1, 1, window), scores / math.sqrt(q.shape[-1]), _NOTHING)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    found = jnp.einsum("whqk,wkhd->wqhd", shares, v.reshape(shape), preferred_element_type=jnp.float32)
    return found.reshape(q.shape).astype(q.dtype)
