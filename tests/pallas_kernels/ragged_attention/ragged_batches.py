"""Ragged batches for tests: sequences with a history in the cache, chunks of new tokens, and NaN everywhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_attention import CacheLayer, Latents, QuantizedCache, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.quantized import is_quantized, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Arguments of `ragged_attention` as NumPy arrays, and the data needed to check its results."""

    arrays: dict[str, Any]  # q, k, v, caches and index arrays, by name
    num_blocks: int
    layer: int
    histories: list[tuple[np.ndarray, np.ndarray]]  # per sequence all keys and values [context, K, D]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """The arguments of `ragged_attention`; `changes` name an array, or a field of one of the pytrees."""
        head_dim = self.arrays["q"].shape[-1]
        flat = {"num_blocks": self.num_blocks, "number": self.layer, "scale": head_dim**-0.5}
        flat |= {name: jax.tree.map(jnp.asarray, array) for name, array in self.arrays.items()} | changes
        pytrees = {"index": RaggedIndex, "layer": CacheLayer, "scoring": Scoring}
        for name, cls in pytrees.items():
            fields = [field.name for field in dataclasses.fields(cls) if field.name in flat]
            flat[name] = cls(**{field: flat.pop(field) for field in fields})
        return flat


def make_batch(
    chunks: Sequence[tuple[int, int]],
    *,
    num_kv_heads: int = 1,
    group: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    num_layers: int = 3,
    layer: int = 1,
    num_tokens: int | None = None,
    num_blocks: int | None = None,
    max_blocks: int | None = None,
    unused_kv: float = np.nan,
    seed: int = 0,
    dtype: type = np.float32,
) -> Batch:
    """A batch of `chunks`, each (query length, context length): (0, 0) is an unused row.

    Blocks are assigned in random order. Memory that belongs to no sequence, including other layers, holds `unused_kv`.
    `num_tokens`, `num_blocks` and `max_blocks` fix the shapes; by default two, two and one more than needed.
    """
    rng = np.random.default_rng(seed)
    num_heads = num_kv_heads * group
    needed = [-(-context // block_size) for _, context in chunks]
    num_blocks = sum(needed) + 2 if num_blocks is None else num_blocks
    num_tokens = sum(query for query, _ in chunks) + 2 if num_tokens is None else num_tokens
    max_blocks = max(needed) + 1 if max_blocks is None else max_blocks

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    free = list(rng.permutation(num_blocks))

    cache_shape = (num_layers * num_blocks, num_kv_heads, block_size, head_dim)
    caches = [np.full(cache_shape, unused_kv, np.float32) for _ in range(2)]
    new = [normal(num_tokens, num_kv_heads, head_dim) for _ in range(2)]
    # Entries that no kernel may read refer to nonexistent blocks.
    tables = np.full((len(chunks), max_blocks), 2**30, np.int32)
    slots = np.full(num_tokens, num_blocks * block_size, np.int32)
    slots[1::2] += 12345  # any slot outside the layer is padding, even if it is in the next layer
    starts, histories = [0], []
    for s, (query, context) in enumerate(chunks):
        blocks = np.array([free.pop() for _ in range(needed[s])], np.int64)
        tables[s, : len(blocks)] = blocks
        positions = np.arange(context)
        flat = blocks[positions // block_size] * block_size + positions % block_size if context else positions
        start, old = starts[-1], context - query
        slots[start : start + query] = flat[old:]
        history = []
        for cache, fresh in zip(caches, new, strict=True):
            own = normal(context, num_kv_heads, head_dim)
            own[old:] = fresh[start : start + query]
            cache[layer * num_blocks + flat[:old] // block_size, :, flat[:old] % block_size] = own[:old]
            history.append(own)
        histories.append((history[0], history[1]))
        starts.append(start + query)
    arrays = {
        "q": normal(num_tokens, num_heads, head_dim),
        "k": new[0],
        "v": new[1],
        "k_cache": as_cache(caches[0], dtype),
        "v_cache": as_cache(caches[1], dtype),
        "kv_slots": slots,
        "query_starts": np.array(starts, np.int32),
        "context_lens": np.array([context for _, context in chunks], np.int32),
        "block_tables": tables,
    }
    return Batch(arrays=arrays, num_blocks=num_blocks, layer=layer, histories=histories)


def make_latent(batch: Batch, latents: Latents) -> None:
    """Makes values of `batch` the first numbers of their keys, whose last numbers are zero where there is a key.

    Only the keys of an 8-bit cache are changed: there, latents have no cache of values.
    """
    arrays, first = batch.arrays, latents.value_dim
    for name in ("q", "k", "k_cache"):
        numbers = arrays[name].values if isinstance(arrays[name], QuantizedCache) else arrays[name]
        rest = numbers[..., latents.key_dim :]
        rest[~np.isnan(rest.astype(np.float32))] = 0
    for values, keys in (("v", "k"), ("v_cache", "k_cache")):
        if not isinstance(arrays[values], QuantizedCache):
            arrays[values][..., :first] = arrays[keys][..., :first]


def as_cache(cache: np.ndarray, dtype: Any) -> np.ndarray | QuantizedCache:
    """`cache` [L*N, K, B, D] in `dtype`. In an 8-bit cache, NaN becomes NaN scales, and NaN values if the dtype has NaN."""
    if not is_quantized(dtype):
        return cache.astype(dtype)
    values, scales = (np.array(x) for x in jax.jit(quantize, static_argnums=1)(cache, dtype))
    unused = np.isnan(cache).any(axis=-1)
    values[unused] = 99 if dtype == jnp.int8 else np.nan
    scales[unused] = np.nan
    return QuantizedCache(values=values, scales=scales)  # pyright: ignore[reportArgumentType] (NumPy's, like the others)
