"""Functions of the user that change logits inside the step program."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.pytree import pytree

_ROWS = 3  # to try a function with; programs have as many rows as they may sample tokens


@pytree
class LogitsRows:
    """What the rows of logits belong to, one entry each."""

    positions: jax.Array
    """i32[R]: position, in its sequence, of the token that is being sampled."""
    last_tokens: jax.Array
    """i32[R]: the token before it."""
    seeds: jax.Array
    """u32[R]: the seed of its request."""


class LogitsProcessor(Protocol):
    """Logits in, logits out; compiled into every step, applied before penalties, bias, masks and temperature.

    A pure function of jax.numpy, of each row on its own: what a request gets must not depend on its companions. Rows
    that are not used hold finite numbers without meaning. -inf forbids a token.
    """

    def __call__(self, logits: jax.Array, rows: LogitsRows, /) -> jax.Array:
        """f32[R, V] of f32[R, V]."""
        ...


def check_processor(processor: LogitsProcessor, vocab_size: int) -> None:
    """ValueError, with the shapes, unless `processor` can be traced and gives logits of the shape and dtype it got."""
    given = jax.ShapeDtypeStruct((_ROWS, vocab_size), jnp.float32)
    integers, seeds = (jax.ShapeDtypeStruct((_ROWS,), dtype) for dtype in (jnp.int32, jnp.uint32))

    def call(logits: jax.Array, positions: jax.Array, last_tokens: jax.Array, seeds: jax.Array) -> jax.Array:
        return processor(logits, LogitsRows(positions=positions, last_tokens=last_tokens, seeds=seeds))

    try:
        got = jax.eval_shape(call, given, integers, integers, seeds)
    except Exception as error:
        raise ValueError(
            f"logits_processor {processor!r} cannot be compiled: {type(error).__name__}: {error}; it takes logits "
            f"float32[R, {vocab_size}] and rows (LogitsRows), and may only use jax.numpy on them"
        ) from error
    if not isinstance(got, jax.ShapeDtypeStruct) or (got.shape, got.dtype) != (given.shape, given.dtype):
        found = f"{got.dtype}{list(got.shape)}" if isinstance(got, jax.ShapeDtypeStruct) else type(got).__name__
        raise ValueError(
            f"logits_processor {processor!r} makes {found} of float32{list(given.shape)}; it must give logits of the "
            "same shape and dtype, for any number of rows"
        )
