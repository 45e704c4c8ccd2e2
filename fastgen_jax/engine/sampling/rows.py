"""Searches and sums over rows as wide as a vocabulary: exact, or the same in whatever order a compiler computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastgen_jax.engine.sampling import lanes
from pallas_kernels import gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32, Shaped, UInt32

PIECE_WIDTH = 128  # lanes of a vector register on TPU; a vocabulary then has a few hundred pieces


def split_rows(x: Shaped[Array, "R V"], *, fill: int | float) -> Shaped[Array, "R pieces width"]:
    """`x` in pieces, padded with `fill`.

    Reductions and searches have two levels: over each piece, then over the pieces. The first one vectorizes on every
    platform; a CPU needs ten times as long for an argmax over whole rows, and many passes for a running sum.
    """
    num_rows, length = x.shape
    width = min(PIECE_WIDTH, length)
    return jnp.pad(x, ((0, 0), (0, -length % width)), constant_values=fill).reshape(num_rows, -1, width)


def take_piece(pieces: Shaped[Array, "R pieces width"], index: Int32[Array, " R"]) -> Shaped[Array, "R width"]:
    """One piece of each row."""
    return jnp.take_along_axis(pieces, index[:, None, None], axis=1, mode="clip")[:, 0]


def _is_tpu() -> bool:
    return gpu_target.platform() == "tpu"


def row_max(logits: Float32[Array, "R V"]) -> Float32[Array, " R"]:
    """The largest value of each row."""
    if _is_tpu():
        return jnp.max(logits, axis=1)
    return jnp.max(jnp.max(split_rows(logits, fill=-jnp.inf), axis=2), axis=1)


def row_argmax(logits: Float32[Array, "R V"]) -> Int32[Array, " R"]:
    """The lowest index of the largest value."""
    if _is_tpu():
        return lanes.argmax(logits)

    def first(x: jax.Array, value: jax.Array) -> jax.Array:
        ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.min(jnp.where(x == value[:, None], ids, x.shape[1] - 1), axis=1)

    pieces = split_rows(logits, fill=-jnp.inf)
    maxima = jnp.max(pieces, axis=2)
    largest = jnp.max(maxima, axis=1)
    piece = first(maxima, largest)
    index = piece * pieces.shape[2] + first(take_piece(pieces, piece), largest)
    return jnp.minimum(index, logits.shape[1] - 1)  # a NaN equals nothing, not even in the last piece


def row_sum(x: Shaped[Array, "R n"]) -> Int32[Array, " R"]:
    """The sum of each row, exact if it fits."""
    return jnp.sum(x, axis=1, dtype=jnp.int32)


def sum_in_any_order(ratios: Float32[Array, "R V"]) -> Float32[Array, " R"]:
    """The sum of each row, the same to the last bit in whatever order it is computed. Ratios are at most 1, V < 2**19.

    Each ratio is 39 bits in three digits, whose sums are exact.
    """
    total, rest, digits = jnp.zeros(ratios.shape[0], jnp.float32), ratios, []
    for _ in range(3):
        rest = rest * 2.0**13
        digits.append(jnp.floor(rest))
        rest = rest - digits[-1]
    digits = [digit.astype(jnp.uint32) for digit in digits]
    sums = _sums_in_one_pass(*digits) if gpu_target.platform() == "cpu" else _sums(*digits)
    for place, digit in reversed(list(enumerate(sums, 1))):
        total = total + digit.astype(jnp.float32) * 2.0 ** (-13 * place)
    return total


def _sums(*digits: UInt32[Array, "R V"]) -> tuple[UInt32[Array, " R"], ...]:
    return tuple(jnp.sum(digit, axis=1, dtype=jnp.uint32) for digit in digits)


def _sums_in_one_pass(*digits: UInt32[Array, "R V"]) -> tuple[UInt32[Array, " R"], ...]:
    """The same on a CPU, whose compiler would compute the digits, and the ratios before them, once for each sum."""
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return tuple(lax.reduce(digits, (np.uint32(0),) * len(digits), add, (1,)))


def sortable(x: Float32[Array, "R V"]) -> Int32[Array, "R V"]:
    """Integers that compare like the floats `x`; both zeros are equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def find_threshold(
    keys: Int32[Array, "R V"],
    weigh: Callable[[Array], Array],
    enough: Int32[Array, " R"],
    is_limited: Bool[Array, " R"],
    *,
    num_bits: int,
    has_branches: bool,
) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
    """A threshold and an index that `reaches` the fewest of the largest `keys` that weigh `enough` together.

    In a row that is not limited, all relevant keys reach them. The threshold is the largest at which the keys that reach it
    weigh enough. It is found bit by bit from the highest: exact, in `num_bits` passes over the keys (32, or 31 if none is
    negative), and many times faster than a sort. With branches, no pass is made if no row is limited.
    """

    def set_bit(i: Int32[Array, ""], threshold: Int32[Array, " R"]) -> Int32[Array, " R"]:
        higher = threshold + (jnp.int32(1) << (num_bits - 1 - i))  # the sign bit, added to the lowest int32, makes 0
        return jnp.where(row_sum(weigh(keys >= higher[:, None])) >= enough, higher, threshold)

    def last_at(threshold: Int32[Array, " R"]) -> Int32[Array, " R"]:
        above = row_sum(weigh(keys > threshold[:, None]))
        return first_reaching(weigh(keys == threshold[:, None]), enough - above)

    lowest = jnp.full_like(enough, -(2**31) if num_bits == 32 else 0)
    if has_branches:
        any_limited = jnp.any(is_limited)
        threshold = lax.fori_loop(0, jnp.where(any_limited, num_bits, 0), set_bit, lowest)
        last = lax.cond(any_limited, last_at, jnp.zeros_like, threshold)
    else:
        threshold = lax.fori_loop(0, num_bits, set_bit, lowest)
        last = last_at(threshold)
    # Every relevant key is above the lowest: that of -inf for logits, 0 for masses.
    return jnp.where(is_limited, threshold, lowest), last


def reaches(
    keys: Int32[Array, "R n"],
    limit: tuple[Int32[Array, " R"], Int32[Array, " R"]],
    *,
    ids: Int32[Array, "R n"] | None = None,
) -> Bool[Array, "R n"]:
    """Whether each key is above the threshold of its row, or equal to it and no later than the last index at it.

    `ids` are the indices of the keys; None: they are whole rows.
    """
    threshold, last = (x[:, None] for x in limit)
    if ids is None:
        ids = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    return (keys > threshold) | ((keys == threshold) & (ids <= last))


def first_reaching(weights: Int32[Array, "R V"], enough: Int32[Array, " R"]) -> Int32[Array, " R"]:
    """The lowest index up to which the non-negative `weights` sum to `enough`, which is at least 1."""
    if _is_tpu():
        return lanes.first_reaching(weights, enough)
    enough = enough[:, None]
    pieces = split_rows(weights, fill=0)
    sums = jnp.cumsum(jnp.sum(pieces, axis=2, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    piece = jnp.minimum(row_sum(sums < enough), sums.shape[1] - 1)
    before = jnp.take_along_axis(jnp.pad(sums, ((0, 0), (1, 0))), piece[:, None], axis=1, mode="clip")
    inside = jnp.cumsum(take_piece(pieces, piece), axis=1, dtype=jnp.int32)
    return jnp.minimum(piece * pieces.shape[2] + row_sum(inside < enough - before), weights.shape[1] - 1)
