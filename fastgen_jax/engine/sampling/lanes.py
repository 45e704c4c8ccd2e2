"""Passes over rows of logits on a TPU, in the layout in which the head writes them: 8 rows by 128 tokens in a register.

A reshape of a row into pieces, a scatter into it, or bits of words that are spread over it make XLA copy all rows into
another layout, which takes longer than these passes: each reads the rows once. All results are those of the portable
functions, to the last bit.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32, Shaped

_LANES = 128
_BITS = 8  # of a byte


def argmax(x: Float32[Array, "R V"]) -> Int32[Array, " R"]:
    """The lowest index of the largest value of each row; the last index in a row with a NaN."""
    largest = jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(x == largest, _ids(x), x.shape[1] - 1), axis=1)


def first_reaching(weights: Int32[Array, "R V"], enough: Int32[Array, " R"]) -> Int32[Array, " R"]:
    """The lowest index up to which the non-negative `weights` sum to `enough`, which is at least 1; bit by bit."""
    num_bits = (weights.shape[1] - 1).bit_length()

    def set_bit(i: Int32[Array, ""], index: Int32[Array, " R"]) -> Int32[Array, " R"]:
        higher = index + (jnp.int32(1) << (num_bits - 1 - i))
        before = jnp.sum(jnp.where(_ids(weights) < higher[:, None], weights, 0), axis=1, dtype=jnp.int32)
        return jnp.where(before < enough, higher, index)

    return jnp.minimum(lax.fori_loop(0, num_bits, set_bit, jnp.zeros_like(enough)), weights.shape[1] - 1)


def add_at(logits: Float32[Array, "R V"], ids: Int32[Array, "R n"], values: Float32[Array, "R n"]) -> Float32[Array, "R V"]:
    """`logits` with `values` added at `ids`, which differ in a row; V and above for none.

    One pass for each column of `ids` that some row uses, whose values come first.
    """
    vocab_size = logits.shape[1]
    used = jnp.max(jnp.sum(ids < vocab_size, axis=1, dtype=jnp.int32))

    def add(i: Int32[Array, ""], logits: Float32[Array, "R V"]) -> Float32[Array, "R V"]:
        index, value = (lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in (ids, values))
        return jnp.where(_ids(logits) == index, logits + value, logits)

    return lax.fori_loop(0, used, add, logits)


def is_any(ids: Int32[Array, "R n"], count: int) -> Bool[Array, "R count"]:
    """Whether each index below `count` is one of the `ids` of a row."""
    column = lax.broadcasted_iota(jnp.int32, (len(ids), count), 1)
    return reduce(jnp.logical_or, [column == ids[:, i : i + 1] for i in range(ids.shape[1])])


def bits(words: Int32[Array, "R words"], count: int) -> Bool[Array, "R count"]:
    """The first bits of each row of `words`, the lowest of each word first.

    A product with a constant repeats each byte for its 8 bits; bytes are exact in bfloat16, which a TPU multiplies.
    """
    num_rows = len(words)
    words = jnp.pad(words, ((0, 0), (0, -words.shape[1] % (_LANES // 32))))
    shifts = jnp.arange(0, 32, _BITS, dtype=jnp.int32)[None, None, :]
    of_pieces = (words[:, :, None] >> shifts & 255).reshape(num_rows, -1, _LANES // _BITS)
    repeat = jnp.repeat(jnp.eye(_LANES // _BITS, dtype=jnp.float32), _BITS, axis=1)
    spread = jnp.einsum("rpb,bl->prl", of_pieces.astype(jnp.float32), repeat)
    lane = lax.broadcasted_iota(jnp.int32, spread.shape, 2)
    found = (spread.astype(jnp.int32) >> lane % _BITS) & 1
    return (found.swapaxes(0, 1).reshape(num_rows, -1) > 0)[:, :count]


def _ids(x: Shaped[Array, "R V"]) -> Int32[Array, "R V"]:
    return lax.broadcasted_iota(jnp.int32, x.shape, 1)
