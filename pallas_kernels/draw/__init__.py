"""Which tokens a draw is decided among: the first pass of the Gumbel-max trick over a vocabulary, on a CPU.

Every token has its own random number, and the winner has the largest of V quotients with a logarithm each. XLA computes
all of them on a single thread. The native kernel bounds each quotient without a logarithm, which leaves a few tokens, and
leaves the decision between these to the program around it. So tokens do not depend on who computed a logarithm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import native

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32, UInt32

__all__ = ["NUM_FRONT_RUNNERS", "front_runners", "is_available"]

NUM_FRONT_RUNNERS = 4
_TARGET = "pallas_kernels_draw"


def is_available() -> bool:
    """Whether there is a native kernel on this machine."""
    return native.load("draw", {_TARGET: "PallasKernelsDraw"})


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
