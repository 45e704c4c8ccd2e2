"""Checks of the shapes, dtypes and static options that implementations of `ragged_attention` rely on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention.arguments import CacheLayer, RaggedIndex, Scoring
from pallas_kernels.ragged_attention.packed import is_packed
from pallas_kernels.ragged_attention.quantized import QUANTIZED_DTYPES, Cache, QuantizedCache, is_quantized

if TYPE_CHECKING:
    from jaxtyping import Array, Float

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _require_shape(name: str, array: jax.Array | QuantizedCache, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)} but must be {meaning} = {shape}")


def _require_rank(name: str, array: jax.Array | QuantizedCache, meaning: str) -> None:
    rank = meaning.count(",") + 1
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {tuple(array.shape)} but must have {rank} axes {meaning}")
    if any(length == 0 for length in array.shape):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; every axis of {meaning} must be at least 1")


def _require_int32(name: str, array: jax.Array) -> None:
    if array.dtype != jnp.int32:
        raise ValueError(f"{name} has dtype {array.dtype} but must be int32; convert it with .astype(jnp.int32)")


def _require_float(name: str, array: jax.Array) -> None:
    if array.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(jnp.dtype(dtype).name for dtype in FLOAT_DTYPES)
        raise ValueError(f"{name} has dtype {array.dtype} but must be one of {accepted}")


def _check_cache(name: str, cache: Cache, scales_per_row: int) -> None:
    if not isinstance(cache, QuantizedCache):
        if is_quantized(cache.dtype):
            raise ValueError(f"{name} has dtype {cache.dtype} but no scales; pass a QuantizedCache")
        _require_float(name, cache)
        return
    if not is_quantized(cache.dtype):
        names = ", ".join(QUANTIZED_DTYPES)
        raise ValueError(f"{name} is a QuantizedCache of dtype {cache.dtype} but must be one of {names}")
    pool, num_kv_heads, block_size, _ = cache.shape
    scales, meaning = (pool, scales_per_row * num_kv_heads, block_size), "[L*N, K, B], as its values,"
    _require_shape(f"{name}.scales", cache.scales, scales, meaning if scales_per_row == 1 else "[L*N, 2K, B]")
    if cache.scales.dtype != jnp.float32:
        raise ValueError(f"{name}.scales has dtype {cache.scales.dtype} but must be float32")


def check(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    k_cache: Cache,
    v_cache: Cache | None,
    index: RaggedIndex,
    layer: CacheLayer,
    scoring: Scoring,
) -> None:
    """Raises a `ValueError` that names the first invalid argument.

    Uses shapes, dtypes and static values only, so it costs nothing in a compiled program. The contents of the index
    arrays (non-decreasing `query_starts`, block ids below `num_blocks`) are not checked.
    """
    _require_rank("q", q, "[T, H, D]")
    _require_rank("k", k, "[T, K, D]")
    _require_rank("k_cache", k_cache, "[L*N, K, B, D]")
    kv_slots, query_starts, context_lens = index.kv_slots, index.query_starts, index.context_lens
    block_tables = index.block_tables
    _require_rank("block_tables", block_tables, "[S, M]")
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    pool, _, block_size, _ = k_cache.shape
    num_sequences = block_tables.shape[0]

    _require_shape("k", k, (num_tokens, num_kv_heads, head_dim), "[T, K, D], T and D as in q,")
    _require_shape("v", v, tuple(k.shape), "the shape of k")
    packed = is_packed(v_cache, scoring)
    if packed:
        rows = (pool, num_kv_heads, block_size, 2 * head_dim)
        _require_shape("k_cache", k_cache, rows, "[L*N, K, B, 2D], because there is no v_cache, K and D as in k,")
    else:
        _require_shape("k_cache", k_cache, (pool, num_kv_heads, block_size, head_dim), "[L*N, K, B, D], K and D as in k,")
    if v_cache is not None:
        _require_shape("v_cache", v_cache, tuple(k_cache.shape), "the shape of k_cache")
    _require_shape("kv_slots", kv_slots, (num_tokens,), "[T]")
    _require_shape("query_starts", query_starts, (num_sequences + 1,), "[S+1], S as in block_tables,")
    _require_shape("context_lens", context_lens, (num_sequences,), "[S], S as in block_tables,")
    for name, array in {
        "kv_slots": kv_slots,
        "query_starts": query_starts,
        "context_lens": context_lens,
        "block_tables": block_tables,
    }.items():
        _require_int32(name, array)
    for name, array in {"q": q, "k": k, "v": v}.items():
        _require_float(name, array)
    for name, cache in {"k_cache": k_cache, "v_cache": v_cache}.items():
        if cache is not None:
            _check_cache(name, cache, 2 if packed else 1)
    if v_cache is not None and v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache has dtype {v_cache.dtype} but must be {k_cache.dtype}, the dtype of k_cache")

    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, which is not a multiple of the {num_kv_heads} heads of k")
    num_blocks, number = layer.num_blocks, layer.number
    if num_blocks < 1 or pool % num_blocks:
        raise ValueError(
            f"num_blocks is {num_blocks} but must be at least 1 and divide the {pool} blocks of k_cache; "
            "pass the number of blocks of one layer"
        )
    num_layers = pool // num_blocks
    if isinstance(number, int):
        if not 0 <= number < num_layers:
            raise ValueError(f"layer is {number} but must be in [0, {num_layers}): k_cache holds {num_layers} layers")
    else:
        _require_shape("layer", number, (), "a scalar")
        _require_int32("layer", number)

    _check_scoring(scoring, num_heads, head_dim)
    if scoring.rotation is not None:
        _check_rotation(*scoring.rotation, scoring.rotation_row, num_tokens=num_tokens, head_dim=head_dim)


def _check_scoring(scoring: Scoring, num_heads: int, head_dim: int) -> None:
    scale, soft_cap, sliding_window = scoring.scale, scoring.soft_cap, scoring.sliding_window
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale} but must be positive and finite, usually D**-0.5 = {head_dim**-0.5:.4g}")
    if isinstance(sliding_window, int):
        if sliding_window < 1:
            raise ValueError(f"sliding_window is {sliding_window} but must be at least 1; None means all previous keys")
    elif sliding_window is not None:
        _require_shape("sliding_window", sliding_window, (), "a scalar")
        _require_int32("sliding_window", sliding_window)
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap is {soft_cap} but must be positive and finite; None leaves the scores uncapped")
    latents = scoring.latents
    if latents is not None and not 1 <= latents.value_dim <= latents.key_dim <= head_dim:
        raise ValueError(
            f"latents have key_dim={latents.key_dim} and value_dim={latents.value_dim}, but must have "
            f"1 <= value_dim <= key_dim <= D = {head_dim}: values are the first numbers of their keys"
        )
    for name, array in {"alibi_slopes": scoring.alibi_slopes, "sinks": scoring.sinks}.items():
        if array is not None:
            _require_shape(name, array, (num_heads,), "[H]")
            if array.dtype != jnp.float32:
                raise ValueError(f"{name} has dtype {array.dtype} but must be float32")


def _check_rotation(cos: jax.Array, sin: jax.Array, row: object, *, num_tokens: int, head_dim: int) -> None:
    axes = "[T, P]" if row is None else "[R, T, P]"
    _require_rank("rotation", cos, axes)
    *rows, _, pairs = cos.shape
    _require_shape("rotation", cos, (*rows, num_tokens, pairs), f"{axes}, T as in q,")
    _require_shape("rotation", sin, tuple(cos.shape), "the shape of the cosines")
    if 2 * pairs > head_dim:
        raise ValueError(f"rotation has {pairs} pairs but q has D = {head_dim}; pass at most {head_dim // 2} pairs")
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        raise ValueError(f"rotation has dtypes {cos.dtype} and {sin.dtype} but both must be float32")
