"""One kernel that rotates a step's queries and keys, writes keys and values into both caches in place, and lays out the
queries for the attention kernels.

XLA launches four kernels for it: it has no scatter into two arrays, and its fusions have one shape of result. Pallas' Triton
backend states which results take the place of which operands, so the caches are not copied.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from pallas_kernels.pallas_types import Ref

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_MOST_HEADS, _MOST_NUMBERS = 16, 4096  # query heads of one program, and their numbers: 64 in a thread of two warps
_WARPS = 2


def rotate_and_write(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    rotation: tuple[Float[Array, "T P"], Float[Array, "T P"]],
    k_cache: Float[Array, "blocks K B D"],
    v_cache: Float[Array, "blocks K B D"],
    *,
    kv_slots: Int[Array, " T"],
    layer: jax.Array,
    num_blocks: int,
    num_rows: int,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "K rows D"], Float[Array, "blocks K B D"], Float[Array, "blocks K B D"]]:
    """The queries as [K, num_rows, D], and both caches with the keys and values of the step.

    Args:
      q, k, v: parts of one projection, which is read where it is if they are adjacent slices of it.
      rotation: cosines and sines f32[T, P] with P up to D / 2; see `rotary.rotate`.
      kv_slots: as for `ragged_attention`; what is outside of the layer's blocks is not written.
      layer: its number, i32[1].
      num_blocks: of a layer.
      num_rows: at least T * G; later rows are zeros.
      dtype: of the queries.
      interpret: passed to `pl.pallas_call`.
    """
    num_tokens, num_heads, head_dim = q.shape
    # In this form XLA recognizes adjacent columns of one array and takes the array itself.
    columns = jnp.concatenate([x.reshape(num_tokens, 1, -1) for x in (q, k, v)], axis=2)
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    heads = min(_MOST_HEADS, pl.next_power_of_2(group), max(1, _MOST_NUMBERS // pl.next_power_of_2(head_dim)))
    qkv = columns.reshape(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    shapes = [jax.ShapeDtypeStruct((num_kv_heads, num_rows, head_dim), dtype)]
    shapes += [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (k_cache, v_cache)]
    return pl.pallas_call(
        functools.partial(_write, num_blocks=num_blocks, group=group, heads=heads),
        out_shape=shapes,
        grid=(-(-num_rows // group), num_kv_heads, -(-group // heads)),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=triton.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="rotate_and_write",
    )(kv_slots, layer, *rotation, qkv, k_cache, v_cache)


def _write(
    slots: Ref,
    layer: Ref,
    cos: Ref,
    sin: Ref,
    qkv: Ref,
    _k: Ref,
    _v: Ref,
    queries: Ref,
    keys: Ref,
    values: Ref,
    *,
    num_blocks: int,
    group: int,
    heads: int,
) -> None:
    """One token, one KV head and up to `heads` of its query heads."""
    token, kv_head, part = (pl.program_id(axis) for axis in range(3))
    (num_tokens, pairs), (num_kv_heads, num_rows, head_dim), block_size = cos.shape, queries.shape, keys.shape[2]
    number = part * heads + jnp.arange(heads, dtype=jnp.int32)
    dim = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    is_number, turns = dim < head_dim, dim < 2 * pairs
    partner = jnp.where(dim < pairs, dim + pairs, jnp.where(turns, dim - pairs, dim))
    angle = jnp.where(dim < pairs, dim, jnp.where(turns, dim - pairs, 0))
    row = token * group + number
    is_row = ((number < group) & (row < num_rows))[:, None] & is_number[None, :]

    @pl.when(token < num_tokens)
    def _() -> None:
        cosines = triton.load(cos.at[token, angle], mask=turns, other=1.0)
        sines = triton.load(sin.at[token, angle], mask=turns, other=0.0)
        sines = jnp.where(dim < pairs, -sines, sines)

        def load(head: jax.Array, at: jax.Array) -> jax.Array:
            return triton.load(qkv.at[token, head[:, None], at[None, :]], mask=is_number[None, :], other=0.0)

        def turned(head: jax.Array) -> jax.Array:
            """Heads [n, D] in float32."""
            return (
                load(head, dim).astype(jnp.float32) * cosines[None, :]
                + load(head, partner).astype(jnp.float32) * sines[None, :]
            )

        q = turned(jnp.minimum(number, group - 1) + kv_head * group)
        triton.store(queries.at[kv_head, row[:, None], dim[None, :]], q.astype(queries.dtype), mask=is_row)

        @pl.when(part == 0)
        def _() -> None:
            slot = slots[token]
            block = layer[0] * num_blocks + jnp.clip(slot // block_size, 0, num_blocks - 1)
            place = (block, kv_head, slot % block_size, dim[None, :])
            is_written = is_number[None, :] & (slot >= 0) & (slot < num_blocks * block_size)
            head = jnp.full((1,), num_kv_heads * group, jnp.int32) + kv_head
            key, value = turned(head).astype(qkv.dtype), load(head + num_kv_heads, dim)
            triton.store(keys.at[*place], key.astype(keys.dtype), mask=is_written)
            triton.store(values.at[*place], value.astype(values.dtype), mask=is_written)

    @pl.when(token >= num_tokens)
    def _() -> None:
        zeros = jnp.zeros((heads, dim.shape[0]), queries.dtype)
        triton.store(queries.at[kv_head, row[:, None], dim[None, :]], zeros, mask=is_row)
