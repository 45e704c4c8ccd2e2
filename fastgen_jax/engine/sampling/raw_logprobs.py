"""Log-probabilities of the model itself: without a request's adjustments, temperature and limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax

from fastgen_jax.engine.sampling.rows import row_max, row_sum, sum_in_any_order
from pallas_kernels import draw, gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32


class Scale(NamedTuple):
    """What turns a logit into a log-probability: subtract both."""

    largest: Float32[Array, " R"]
    log_total: Float32[Array, " R"]

    def logprobs(self, logits: Float32[Array, "R n"]) -> Float32[Array, "R n"]:
        return below_largest(logits, self.largest) - self.log_total[:, None]


class RawLogprobs(NamedTuple):
    """The log-probabilities and ranks of tokens without the draw's parameters."""

    logprobs: Float32[Array, " R"]
    ranks: Int32[Array, " R"]
    scale: Scale


def has_kernels() -> bool:
    """Whether native kernels read the logits."""
    return gpu_target.platform() == "cpu" and draw.is_available()


def below_largest(logits: Float32[Array, "R n"], largest: Float32[Array, " R"]) -> Float32[Array, "R n"]:
    """How far logits are below the largest, for which it is set and not computed, because inf - inf is NaN."""
    largest = largest[:, None]
    return jnp.where(logits == largest, 0, logits - largest)


def raw_logprobs(logits: Float32[Array, "R V"], tokens: Int32[Array, " R"]) -> RawLogprobs:
    """Those of `tokens`, one in each row."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    if has_kernels():
        found = draw.given(logits, tokens, temperature=None)
        largest, total, ranks = found.largest, found.raw_totals, found.ranks[:, 0]
    else:
        largest = row_max(logits)
        total, ranks = sum_in_any_order(jnp.exp(below_largest(logits, largest))), 1 + row_sum(logits > chosen)
    # The sum is at least 1. XLA's log, unlike its log1p, rounds differently in full vectors and in the remainder.
    scale = Scale(largest, jnp.log1p(total - 1))
    return RawLogprobs(scale.logprobs(chosen)[:, 0], ranks, scale)


def no_logprobs(num_rows: int) -> RawLogprobs:
    """Zeros, if nobody wants them."""
    zeros = jnp.zeros(num_rows, jnp.float32)
    return RawLogprobs(zeros, jnp.zeros(num_rows, jnp.int32), Scale(zeros, zeros))


def likeliest(
    logits: Float32[Array, "R V"], scale: Scale, *, max_logprobs: int
) -> tuple[Int32[Array, "R max_logprobs"], Float32[Array, "R max_logprobs"]]:
    """The most likely tokens and their log-probabilities."""
    vocab_size = logits.shape[1]
    num_top = min(max_logprobs, vocab_size)
    values, top_ids = lax.top_k(logits, num_top)
    fill = ((0, 0), (0, max_logprobs - num_top))
    return (
        jnp.pad(top_ids.astype(jnp.int32), fill, constant_values=vocab_size),
        jnp.pad(scale.logprobs(values), fill, constant_values=-jnp.inf),
    )


def no_likeliest(
    logits: Float32[Array, "R V"], scale: Scale, *, max_logprobs: int
) -> tuple[Int32[Array, "R max_logprobs"], Float32[Array, "R max_logprobs"]]:
    """Zeros in the shape of `likeliest`."""
    shape = (logits.shape[0], max_logprobs)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
