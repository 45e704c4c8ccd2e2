"""Calls of attention that the gates compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of ragged attention."""

    name: str
    num_tokens: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 32
    num_sequences: int = 64
    context: int = 4096
    window: int | None = None
    soft_cap: float | None = None
    extras: bool = False  # ALiBi slopes and sinks
    dtype: str = "bfloat16"
    kv_dtype: str | None = None  # None: dtype
    latents: tuple[int, int] | None = None  # key_dim and value_dim, if values are parts of their keys
    packed: bool = False  # keys and values share rows of the cache, as with heads of 64 on a TPU


CALLS = (
    Call(name="decode 64 x 4k", num_tokens=64),
    Call(name="prompt 2k", num_tokens=2048, num_sequences=1),
    Call(name="mixed 2k, 64 sequences", num_tokens=2048),
    Call(name="70B on 8 devices, B=128", num_tokens=512, num_heads=8, num_kv_heads=1, block_size=128),
    Call(name="one token", num_tokens=1, num_sequences=1),
    Call(name="32 KV heads", num_tokens=512, num_kv_heads=32),
    Call(name="71 query heads on one KV head", num_tokens=512, num_heads=71, num_kv_heads=1),
    Call(name="window, cap, ALiBi, sinks", num_tokens=512, window=1024, soft_cap=50.0, extras=True),
    Call(name="heads of 256", num_tokens=512, num_heads=8, num_kv_heads=4, head_dim=256),
    Call(name="float32 cache", num_tokens=256, num_heads=8, num_kv_heads=2, dtype="float32"),
    Call(name="int8 KV, mixed 2k, 64 sequences", num_tokens=2048, block_size=128, kv_dtype="int8"),
    Call(name="int8 KV, 70B on 8 devices", num_tokens=512, num_heads=8, num_kv_heads=1, block_size=128, kv_dtype="int8"),
    Call(name="int8 KV, 32 KV heads", num_tokens=512, num_kv_heads=32, block_size=128, kv_dtype="int8"),
    Call(name="float8 KV, decode 64 x 4k", num_tokens=64, block_size=128, kv_dtype="float8_e4m3fn"),
    Call(name="heads of 64", num_tokens=512, head_dim=64, block_size=128, packed=True),
    Call(name="heads of 64, MQA, sinks", num_tokens=512, num_kv_heads=1, head_dim=64, window=128, extras=True, packed=True),
    Call(name="heads of 64, int8 KV", num_tokens=512, head_dim=64, block_size=128, kv_dtype="int8", packed=True),
    Call(
        name="heads of 64, float8 KV, K=3",
        num_tokens=512,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        block_size=128,
        kv_dtype="float8_e4m3fn",
        packed=True,
    ),
    Call(name="128k contexts", num_tokens=512, context=131072),
    Call(name="tables of 48 Ki blocks", num_tokens=64, num_heads=8, num_kv_heads=1, num_sequences=2, context=49152 * 32),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Product:
    """One product with a layer of int4 as checkpoints have it: other sizes of blocks, float32 scales, offsets."""

    name: str
    rows: int
    size: int
    scales: str
    inputs: int = 14336
    columns: int = 4096


INT4_PRODUCTS = (
    Int4Product(name="tiles of 128 rows", rows=512, size=32, scales="float32"),
    Int4Product(name="128 inputs a scale", rows=64, size=128, scales="float16"),
    Int4Product(name="columns of half a swizzle", rows=64, size=64, scales="float32", inputs=4096, columns=16032),
)


def lower_int4(product: Int4Product, array: Callable[..., Any]) -> Any:
    """The product lowered for bfloat16; `array` as for `lower_attention`."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.matmul import Int4Weight, linear

    factors = array((2, product.inputs // product.size, product.columns), jnp.dtype(product.scales))
    values = array((2, product.inputs // 2, product.columns), jnp.uint8)
    weight = Int4Weight(values=values, scales=factors, offsets=factors)
    arguments = array((product.rows, product.inputs), jnp.bfloat16), weight, array((), jnp.int32)
    return jax.jit(lambda x, w, layer: linear(x, w.at_layer(layer))).lower(*arguments)


def lower_attention(
    call: Call, attention: Callable[..., Any], array: Callable[..., Any], *, num_blocks: int
) -> tuple[Any, int]:
    """`attention` lowered for `call` over a donated cache of `num_blocks` blocks, and the bytes of that cache.

    `array(shape, dtype)` creates an abstract argument.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.ragged_attention import CacheLayer, Latents, QuantizedCache, RaggedIndex, Scoring
    from pallas_kernels.ragged_attention.quantized import is_quantized

    dtype, kv_dtype, i32, f32 = jnp.dtype(call.dtype), jnp.dtype(call.kv_dtype or call.dtype), jnp.int32, jnp.float32
    q = array((call.num_tokens, call.num_heads, call.head_dim), dtype)
    new = array((call.num_tokens, call.num_kv_heads, call.head_dim), dtype)
    parts = 2 if call.packed else 1
    cache = array((num_blocks, call.num_kv_heads, call.block_size, parts * call.head_dim), kv_dtype)
    if is_quantized(kv_dtype):
        cache = QuantizedCache(values=cache, scales=array((num_blocks, parts * call.num_kv_heads, call.block_size), f32))
    caches = (cache, None if call.packed or call.latents is not None else cache)
    index = RaggedIndex(
        kv_slots=array((call.num_tokens,), i32),
        query_starts=array((call.num_sequences + 1,), i32),
        context_lens=array((call.num_sequences,), i32),
        block_tables=array((call.num_sequences, call.context // call.block_size), i32),
    )
    extras = {name: array((call.num_heads,), f32) for name in ("alibi_slopes", "sinks") if call.extras}

    def program(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, index: Any, extras: dict[str, Any]) -> Any:
        latents = None if call.latents is None else Latents(key_dim=call.latents[0], value_dim=call.latents[1])
        scoring = Scoring(scale=0.1, sliding_window=call.window, soft_cap=call.soft_cap, latents=latents, **extras)
        return attention(q, k, v, k_cache, v_cache, index, CacheLayer(number=0, num_blocks=num_blocks), scoring)

    lowered = jax.jit(program, donate_argnums=(3, 4)).lower(q, new, new, *caches, index, extras)
    return lowered, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
