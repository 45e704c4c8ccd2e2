"""Sparse attention over latents (DeepSeek Sparse Attention, DeepSeek-V3.2): an indexer chooses what a query attends to.

A query at position p has p + 1 keys. Up to `num_chosen` keys it attends to all of them, with the kernels of `mla`. With
more, the indexer scores every key, and attention reads the best `num_chosen`:

    score of key k    sum over the indexer's heads h of  w_h relu(q_h . k) / sqrt(heads * D)

Queries q come from the latent of the model's queries, keys and weights w from the layer's input. A token's key is cached as
part of its value, [c | index key], so it lives and moves with the latent. The published code multiplies q and k by a
Hadamard matrix before it rounds them to 8 bits. That matrix is orthogonal, so without the rounding it changes no score
and is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import project
from fastgen_jax.models.moe_config import IndexerConfig
from fastgen_jax.models.sharding import TENSOR
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels import sparse_attention
from pallas_kernels.norm import layer_norm
from pallas_kernels.ragged_attention import CacheLayer, QuantizedCache, RaggedIndex
from pallas_kernels.ragged_attention.quantized import is_quantized
from pallas_kernels.rotary import rotate
from pallas_kernels.sparse_attention import IndexQueries, LatentCache, SparseTokens

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_NORM_EPS = 1e-6  # of the keys, regardless of the model's other norms


def indexer_of(config: ModelConfig) -> IndexerConfig | None:
    """The indexer of a model, if it has one."""
    return None if config.mla is None else config.mla.indexer


def refuse_choice(config: ModelConfig, num_tokens: int, what: str) -> None:
    """ValueError if the indexer would leave out some of `num_tokens` tokens, which `what` does not support."""
    indexer = indexer_of(config)
    if indexer is not None and num_tokens > indexer.num_chosen:
        raise ValueError(
            f"{what} got {num_tokens} tokens, but in this model queries with more than {indexer.num_chosen} attend to those "
            f"that its indexer chooses, which is supported in the engine only; pass at most {indexer.num_chosen} tokens"
        )


def check_kv_dtype(kv_dtype: DTypeLike, config: ModelConfig, longest: int) -> None:
    """ValueError if contexts of up to `longest` tokens need keys of an indexer, and the cache would round them to 8 bits."""
    indexer = indexer_of(config)
    if indexer is not None and longest > indexer.num_chosen and is_quantized(kv_dtype):
        raise ValueError(
            f"kv_dtype={jnp.dtype(kv_dtype).name!r} is not supported for contexts of more than {indexer.num_chosen} tokens "
            f"in this model, whose indexer reads the cache; use kv_dtype='bfloat16', or max_context_len={indexer.num_chosen}"
        )


def attended_in_full(index: RaggedIndex, positions: Int[Array, " T"], num_chosen: int) -> RaggedIndex:
    """`index` for kernels that attend to everything, in which tokens from position `num_chosen` on cost little.

        query_starts  0 . . . . . 6            0 . . . 4 . 6
        positions     2 3 4 5 6 7        ->    2 3 4 5|6 7         with num_chosen = 6
        context_lens  8                        6       2

    Those tokens are a row of their own that seems to begin a sequence. Its results are meaningless, and finite.
    """
    queries, num_sequences = jnp.diff(index.query_starts), index.context_lens.shape[0]
    num_rows = num_sequences + min(num_sequences, positions.shape[0] // 2)  # a row is divided if it has 2 tokens or more
    starts = index.context_lens - queries
    in_full = jnp.clip(num_chosen - starts, 0, queries)
    rest = queries - in_full
    counts = (in_full > 0).astype(jnp.int32) + (rest > 0).astype(jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(ends[None, :] <= row[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    used = row < ends[-1]
    is_rest = (row == ends[sequence] - 1) & (rest[sequence] > 0)
    begins = index.query_starts[:-1][sequence] + jnp.where(is_rest, in_full[sequence], 0)
    contexts = jnp.where(is_rest, rest[sequence], starts[sequence] + in_full[sequence])
    num_tokens = index.query_starts[-1]
    return RaggedIndex(
        kv_slots=index.kv_slots,
        query_starts=jnp.append(jnp.where(used, begins, num_tokens), num_tokens),
        context_lens=jnp.where(used, contexts, 0),
        block_tables=index.block_tables[sequence],
    )


def with_choice(cache: KVCache, config: ModelConfig, num_tokens: int) -> KVCache:
    """`cache` with room for the choice of each token, which layers pass on to those that have no indexer."""
    indexer = indexer_of(config)
    assert indexer is not None
    return replace(cache, chosen=jnp.zeros((num_tokens, indexer.num_chosen), jnp.int32))


def index_keys(
    x: Float[Array, "T E"],
    w: LayerWeights,
    turn: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    *,
    num_tokens: Int[Array, ""],
) -> Float[Array, "T 1 D"]:
    """The key of each token for the indexer of a layer that has one."""
    key = project(x, w, "index_k", num_rows=num_tokens)
    key = layer_norm(key, w["index_k_norm"], w["index_k_norm_bias"], eps=_NORM_EPS, num_rows=num_tokens)
    return rotate(key[:, None], *turn)


def index_queries(
    x: Float[Array, "T E"],
    q_latent: Float[Array, "T q_rank"],
    w: LayerWeights,
    turn: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    *,
    config: IndexerConfig,
    num_tokens: Int[Array, ""],
) -> IndexQueries:
    """What the indexer of a layer asks for each token."""
    queries = project(q_latent, w, "index_q", num_rows=num_tokens).reshape(-1, config.num_heads, config.head_dim)
    weights = project(x, w, "index_weights", num_rows=num_tokens).astype(jnp.float32)
    return IndexQueries(queries=rotate(queries, *turn), weights=weights * (config.num_heads * config.head_dim) ** -0.5)


def attend_to_chosen(
    q: Float[Array, "T H D"],
    out: Float[Array, "T H D"],
    asked: IndexQueries | None,
    cache: KVCache,
    index: RaggedIndex,
    layer: CacheLayer,
    tokens: SparseTokens,
    *,
    rank: int,
    scale: float,
    mesh: Mesh | None,
) -> tuple[Float[Array, "T H D"], KVCache]:
    """`out` with the results of `tokens` replaced, and the cache with their choice; `asked` is None for that of before."""
    assert not isinstance(cache.k, QuantizedCache)
    assert not isinstance(cache.v, QuantizedCache), "checked by check_kv_dtype"
    assert cache.chosen is not None, "made by with_choice"

    def run(
        q: jax.Array,
        out: jax.Array,
        asked: IndexQueries | None,
        k_cache: jax.Array,
        v_cache: jax.Array | None,
        tables: jax.Array,
        number: jax.Array,
        tokens: SparseTokens,
        chosen: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        of_layer = CacheLayer(number=number, num_blocks=layer.num_blocks)
        latents = LatentCache(k=k_cache, v=v_cache, tables=tables, layer=of_layer, rank=rank)
        if asked is not None:
            chosen = sparse_attention.choose(asked, latents, tokens, chosen)
        return sparse_attention.attend(q, latents, tokens, chosen, out, scale=scale), chosen

    if mesh is not None:  # every device has a copy of the latents and makes the same choice
        heads, whole = PartitionSpec(None, TENSOR), PartitionSpec()
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(heads, heads, whole, heads, heads, whole, whole, whole, whole),
            out_specs=(heads, whole),
            check_vma=False,
        )
    number = jnp.asarray(layer.number, jnp.int32)
    out, chosen = run(q, out, asked, cache.k, cache.v, index.block_tables, number, tokens, cache.chosen)
    return out, replace(cache, chosen=chosen)
