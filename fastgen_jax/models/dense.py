"""The decoder without a KV cache, for training and research: whole sequences of one length, differentiable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.core import RaggedBatch
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, forward
from fastgen_jax.models.kept_keys import cache_of_pass
from fastgen_jax.models.sparse import refuse_choice
from fastgen_jax.models.states import refuse_states
from fastgen_jax.models.weight_spec import Params
from pallas_kernels.ragged_attention import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.quantized import Cache

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def dense_forward(params: Params, token_ids: Int[Array, "S P"], *, config: ModelConfig) -> Float[Array, "S P V"]:
    """Logits in float32 of S sequences of P tokens each.

    This is `forward` on one batch with all sequences, and with attention as one matrix product instead of over a blocked
    cache, so what is trained here is what the engine computes. The attention scores take S * H * P * P numbers.
    """
    refuse_states(config, "dense_forward")
    num_sequences, length = token_ids.shape
    refuse_choice(config, length, "dense_forward")
    num_tokens = num_sequences * length
    zeros = jnp.zeros(num_tokens, jnp.int32)
    batch = RaggedBatch(
        token_ids=token_ids.reshape(num_tokens),
        token_slots=zeros,
        positions=jnp.tile(jnp.arange(length, dtype=jnp.int32), num_sequences),
        rope_lengths=jnp.full(num_tokens, length, jnp.int32),
        index=RaggedIndex(
            kv_slots=zeros,
            query_starts=jnp.arange(num_sequences + 1, dtype=jnp.int32) * length,
            context_lens=jnp.full(num_sequences, length, jnp.int32),
            block_tables=jnp.zeros((num_sequences, 0), jnp.int32),
        ),
        sample_rows=jnp.arange(num_tokens, dtype=jnp.int32),
        num_sample_rows=jnp.asarray(num_tokens, jnp.int32),
    )
    logits, _ = forward(
        params, cache_of_pass(config, num_tokens), batch, config=config, execution=Execution(attention=causal_attention)
    )
    return logits.reshape(num_sequences, length, -1)


def causal_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
) -> tuple[Float[Array, "T H D"], Cache, Cache | None]:
    """`ragged_attention` for sequences that start in this batch and have the same length; the caches are not changed."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_sequences = k.shape[1], index.context_lens.shape[0]
    length = num_tokens // num_sequences
    queries = q.reshape(num_sequences, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys, values = (x.reshape(num_sequences, length, num_kv_heads, head_dim) for x in (k, v))
    scores = scoring.scale * jnp.einsum("nqkgd,njkd->nkgqj", queries, keys, preferred_element_type=jnp.float32)
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    places = jnp.arange(length)
    distance = (places[None, :] - places[:, None])[None, None, None]  # [..., query, key], 0 on the diagonal
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.reshape(num_kv_heads, -1)[None, :, :, None, None]
        scores = scores + slopes * distance.astype(jnp.float32)
    is_visible = distance <= 0
    if scoring.sliding_window is not None:
        is_visible &= distance > -scoring.sliding_window
    scores = jnp.where(is_visible, scores, -jnp.inf)
    if scoring.sinks is not None:  # one additional logit per head that receives probability but has no value
        sink = jnp.broadcast_to(scoring.sinks.reshape(num_kv_heads, -1)[None, :, :, None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("nkgqj,njkd->nqkgd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), k_cache, v_cache
