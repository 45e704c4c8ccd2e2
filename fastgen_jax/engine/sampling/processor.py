"""User functions that change logits inside the step program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32, UInt32

_ROWS = 3  # for the trial call; a program has a row for each token that it may sample


@pytree
class LogitsRows:
    """The tokens that the rows of logits predict, one entry per row."""

    positions: Int32[Array, " R"]
    """Position, in its sequence, of the token that is being sampled."""
    last_tokens: Int32[Array, " R"]
    """The token before it."""
    seeds: UInt32[Array, " R"]
    """The seed of its request."""


class LogitsProcessor(Protocol):
    """Logits in, logits out; compiled into every step, applied before penalties, bias, masks and temperature.

    A pure jax.numpy function that treats each row independently: a result must not depend on the other requests in the
    batch. Unused rows hold arbitrary finite numbers. -inf forbids a token.
    """

    def __call__(self, logits: Float32[Array, "R V"], rows: LogitsRows, /) -> Float32[Array, "R V"]:
        """The logits to sample from."""
        ...


def check_processor(processor: LogitsProcessor, vocab_size: int) -> None:
    """ValueError, with the shapes, unless `processor` can be traced and preserves the shape and dtype of the logits."""
    given = jax.ShapeDtypeStruct((_ROWS, vocab_size), jnp.float32)
    integers, seeds = (jax.ShapeDtypeStruct((_ROWS,), dtype) for dtype in (jnp.int32, jnp.uint32))

    def call(logits: jax.Array, positions: jax.Array, last_tokens: jax.Array, seeds: jax.Array) -> jax.Array:
        return processor(logits, LogitsRows(positions=positions, last_tokens=last_tokens, seeds=seeds))

    try:
        got = jax.eval_shape(call, given, integers, integers, seeds)
    except Exception as error:
        raise ValueError(
            f"logits_processor {processor!r} cannot be compiled: {type(error).__name__}: {error}; it is called with logits "
            f"float32[R, {vocab_size}] and rows (LogitsRows), and may use only jax.numpy on them"
        ) from error
    if not isinstance(got, jax.ShapeDtypeStruct) or (got.shape, got.dtype) != (given.shape, given.dtype):
        found = f"{got.dtype}{list(got.shape)}" if isinstance(got, jax.ShapeDtypeStruct) else type(got).__name__
        raise ValueError(
            f"logits_processor {processor!r} makes {found} of float32{list(given.shape)}; it must return logits of the "
            "same shape and dtype, for any number of rows"
        )
