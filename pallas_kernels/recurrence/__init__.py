"""Layers with a state on a CPU: a convolution over the last tokens, and a linear recurrence, for the chunks of a step.

Native kernels, see `cpu.cc`; there are none for accelerators, on which matrix products over several tokens are faster. The
definitions are in `reference`. No bit of a token's result depends on how its sequence is split into chunks, or on the other
sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = ["Chunks", "available", "convolution", "recurrence"]

_CONVOLUTION, _RECURRENCE = "pallas_kernels_convolution", "pallas_kernels_recurrence"
MAX_WIDTH = 16  # tokens of a convolution


class Chunks(NamedTuple):
    """Chunk s computes the positions [starts[s], stops[s]) of the sequence whose states are at `places[s]` of the pools.

    Its tokens begin at `first_tokens[s]` of the batch, in which chunks lie one after another. A chunk without tokens, or
    with a place beyond the pool, is padding.
    """

    places: Int[Array, " S"]
    starts: Int[Array, " S"]
    stops: Int[Array, " S"]
    first_tokens: Int[Array, " S"]


def available() -> bool:
    """Whether the kernels can be called; compiles them if necessary (seconds, once per machine)."""
    return native.load("recurrence", {_CONVOLUTION: "PallasKernelsConvolution", _RECURRENCE: "PallasKernelsRecurrence"})


def _require() -> None:
    if not available():
        reason = native.unavailable_reason() or "the log has the reason"
        raise ValueError(f"this needs native kernels, which are not available here: {reason}")


def convolution(
    x: Float[Array, "T _"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, " C"] | None,
    tails: Float[Array, "places _"],
    chunks: Chunks,
    *,
    column: int = 0,
    silu: bool = False,
) -> tuple[Float[Array, "T C"], Float[Array, "places _"]]:
    """sum_j kernel[W - 1 - j] x[position - j] + bias in float32, with or without SiLU, and the tails after this step.

    Args:
      x: its columns from `column` on are the C channels.
      kernel: 2 <= W <= 16.
      tails: for each place the last W - 1 inputs of its sequence, one after another, that of position p in place
        p mod (W - 1); not read before position 0. Updated in place if they are donated.

    Raises:
      ValueError: shapes do not fit, or there are no native kernels here.
    """
    if not 2 <= kernel.shape[0] <= MAX_WIDTH or tails.shape[1] != (kernel.shape[0] - 1) * kernel.shape[1]:
        raise ValueError(
            f"kernel is {list(kernel.shape)} and tails {list(tails.shape)}, but must be [W, C] with 2 <= W <= {MAX_WIDTH} "
            "and [places, (W - 1) * C]"
        )
    _require()
    result = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(
        _CONVOLUTION, (result, jax.ShapeDtypeStruct(tails.shape, jnp.float32)), input_output_aliases={3: 1}
    )
    bias = jnp.zeros((0,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    inputs = (x.astype(jnp.float32), kernel.astype(jnp.float32), bias, tails)
    y, tails = call(*inputs, *chunks, column=np.int64(column), silu=silu)
    return y, tails


def recurrence(
    q: Float[Array, "T K D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T H Dv"],
    decay: Float[Array, "T H"],
    gain: Float[Array, "T H"],
    states: Float[Array, "places H D Dv"],
    chunks: Chunks,
    *,
    delta: bool,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "places H D Dv"]]:
    """S^T q of each token and head, zero for padding, and the states after this step, in float32.

    For each token S = exp(decay) S, then S = S + k u^T, where u = gain v, and by the `delta` rule u = gain (v - S^T k). Each
    of the K heads of `q` and `k` serves H / K adjacent heads of `v`.

    Args:
      decay: not positive.
      states: not read before position 0. Updated in place if they are donated.

    Raises:
      ValueError: shapes do not fit, or there are no native kernels here.
    """
    if v.shape[1] % k.shape[1] or states.shape[1:] != (v.shape[1], k.shape[2], v.shape[2]):
        raise ValueError(
            f"k is {list(k.shape)}, v {list(v.shape)} and states {list(states.shape)}, but must be [T, K, D], [T, H, Dv] "
            "with H a multiple of K, and [places, H, D, Dv]"
        )
    _require()
    call = jax.ffi.ffi_call(
        _RECURRENCE,
        (jax.ShapeDtypeStruct(v.shape, jnp.float32), jax.ShapeDtypeStruct(states.shape, jnp.float32)),
        input_output_aliases={5: 1},
    )
    inputs = (x.astype(jnp.float32) for x in (q, k, v, decay, gain))
    out, states = call(*inputs, states, *chunks, is_delta=delta)
    return out, states
