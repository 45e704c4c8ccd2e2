"""The definition of `packed_attention`: all scores at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention import Scoring

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST


def packed_attention_reference(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    query_starts: Int[Array, " bounds"],
    scoring: Scoring,
) -> Float[Array, "T H D"]:
    """See `packed_attention`."""
    (num_tokens, _, head_dim), num_kv_heads = q.shape, k.shape[1]
    queries = q.reshape(num_tokens, num_kv_heads, -1, head_dim).astype(jnp.float32)  # [T, K, G, D]
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
    scores = scoring.scale * jnp.einsum("tkgd,jkd->kgtj", queries, keys, precision=HIGHEST)
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    distance = token[None, :] - token[:, None]  # [query, key], 0 on the diagonal
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.reshape(num_kv_heads, -1, 1, 1)
        scores = scores + slopes * distance.astype(jnp.float32)[None, None]
    sequence = jnp.sum(query_starts[None, 1:] <= token[:, None], axis=1)
    is_visible = (distance <= 0) & (sequence[:, None] == sequence[None, :])
    if scoring.sliding_window is not None:
        is_visible &= distance > -scoring.sliding_window
    scores = jnp.where(is_visible[None, None], scores, -jnp.inf)
    if scoring.sinks is not None:  # one additional logit per head that receives probability but has no value
        sinks = jnp.broadcast_to(scoring.sinks.reshape(num_kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :num_tokens]
    out = jnp.einsum("kgtj,jkd->tkgd", weights, values, precision=HIGHEST).reshape(q.shape)
    return jnp.where((token < query_starts[-1])[:, None, None], out, 0.0).astype(q.dtype)
