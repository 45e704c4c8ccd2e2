"""Draws from rows of logits on a CPU, and the numbers that belong to them.

In a draw every token has its own random number, and the winner has the largest of V quotients with a logarithm each (the
Gumbel-max trick). XLA computes all of them on a single thread. The native kernels bound each quotient without a logarithm,
which leaves a few tokens, and leave the decision between these to the program around them. So tokens do not depend on who
computed a logarithm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import native

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32, UInt32

__all__ = ["NUM_FRONT_RUNNERS", "Found", "exponentials", "front_runners", "given", "in_one_pass", "is_available"]

NUM_FRONT_RUNNERS = 4
_TARGET = "pallas_kernels_draw"
_SYMBOLS = {
    _TARGET: "PallasKernelsDraw",
    f"{_TARGET}_ratios": "PallasKernelsDrawRatios",
    f"{_TARGET}_one_pass": "PallasKernelsDrawOnePass",
}


def is_available() -> bool:
    """Whether there are native kernels on this machine."""
    return native.load("draw", _SYMBOLS)


def front_runners(
    logits: Float32[Array, "R V"],
    weights: Int32[Array, "R V"],
    keys: UInt32[Array, "R 2"],
    is_drawn: Bool[Array, " R"],
) -> Int32[Array, "R front_runners"]:
    """The tokens of each row that may have the largest `weight / -log(1 - u)`, in ascending order; the last is repeated.

    `u` is `(bits + 0.5) / 2**32` for the 32 bits that Threefry-2x32 makes of the row's key and the token's number, and at
    most `1 - 2**-24`. All tokens whose quotient is within 3.8e-6 of the largest are found, or the first four of them: a
    fifth has a probability below 1e-18. Tokens of weight 0 are never drawn; a row without others gets 0. A row that is
    not drawn gets the lowest index of its largest logit.
    """
    return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((len(weights), NUM_FRONT_RUNNERS), jnp.int32))(
        logits, weights, lax.bitcast_convert_type(keys, jnp.int32), is_drawn.astype(jnp.int32)
    )


def exponentials(
    logits: Float32[Array, "R V"], largest: Float32[Array, " R"], divisors: Float32[Array, " R"]
) -> Float32[Array, "R V"]:
    """`exp((logits - largest) / divisors)`, where `largest` is the largest logit of each row; 1 for that one.

    `in_one_pass` adds up the same numbers, to the last bit.
    """
    return jax.ffi.ffi_call(f"{_TARGET}_ratios", jax.ShapeDtypeStruct(logits.shape, jnp.float32))(logits, largest, divisors)


class Found(NamedTuple):
    """What `in_one_pass` finds out about each row."""

    ids: Int32[Array, "R front_runners"]
    """As those of `front_runners`; in a row with a target, the target."""
    weights: Int32[Array, "R front_runners"]
    """The probabilities of `ids` as integers, of which 2**30 is 1; 0 in a row that is not drawn."""
    bits: UInt32[Array, "R front_runners"]
    """The random bits of `ids` in the draw; 0 in a row that is not drawn."""
    ranks: Int32[Array, "R front_runners"]
    """1 + how many logits are larger; 0 if log-probabilities are not wanted."""
    largest: Float32[Array, " R"]
    """The largest logit."""
    totals: Float32[Array, " R"]
    """The exact sum of `exponentials` at the temperature of the row, rounded; 1 at temperature 0."""
    raw_totals: Float32[Array, " R"]
    """The same at temperature 1, if log-probabilities are wanted."""


def in_one_pass(
    logits: Float32[Array, "R V"],
    seeds: UInt32[Array, " R"],
    positions: Int32[Array, " R"],
    temperature: Float32[Array, " R"],
    targets: Int32[Array, " R"],
    wants_logprobs: Int32[Array, ""],
) -> Found:
    """The front-runners of draws from `softmax(logits / temperature)`, and the sums and ranks for log-probabilities.

    The key of a row's random bits is `fold_in(key(seed), position)`, by Threefry-2x32 as in `jax.random`. A row whose
    target is in the vocabulary is not drawn, but has `totals`; one of temperature 0 gets the lowest index of its largest
    logit. No array is as large as the logits.
    """
    few = jax.ShapeDtypeStruct((len(logits), NUM_FRONT_RUNNERS), jnp.int32)
    number = jax.ShapeDtypeStruct((len(logits),), jnp.float32)
    call = jax.ffi.ffi_call(f"{_TARGET}_one_pass", (few, few, few, few, number, number, number))
    ids, weights, bits, *rest = call(
        logits, lax.bitcast_convert_type(seeds, jnp.int32), positions, temperature, targets, wants_logprobs
    )
    return Found(ids, weights, lax.bitcast_convert_type(bits, jnp.uint32), *rest)


def given(logits: Float32[Array, "R V"], tokens: Int32[Array, " R"], *, temperature: Float32[Array, " R"] | None) -> Found:
    """The sums for the log-probabilities of `tokens`: `totals` at `temperature`; or, without, `raw_totals` and `ranks`."""
    zeros, wants = jnp.zeros(len(logits), jnp.int32), jnp.int32(temperature is None)
    targets = jnp.clip(tokens, 0, logits.shape[1] - 1)
    temperature = zeros.astype(jnp.float32) if temperature is None else temperature
    return in_one_pass(logits, zeros.astype(jnp.uint32), zeros, temperature, targets, wants)
