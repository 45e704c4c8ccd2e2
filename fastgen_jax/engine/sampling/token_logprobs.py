"""The sampler's log-probabilities of given tokens, differentiable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fastgen_jax.engine.sampling.rows import row_max, sum_in_any_order
from pallas_kernels import draw, gpu_target

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32


@jax.custom_jvp
def token_logprobs(
    logits: Float32[Array, "R V"], tokens: Int32[Array, " R"], temperature: Float32[Array, " R"]
) -> Float32[Array, " R"]:
    """The natural logarithm of the probability of one token per row, of `logits / temperature`.

    These are the numbers of `SampleOutput`: the raw one at a temperature of 1, and otherwise the processed one. They are
    computed as the sampler does it, because XLA rounds differently where one divisor serves a whole row and where it
    serves one number. Differentiable with respect to `logits`.
    """
    if gpu_target.platform() == "cpu" and draw.is_available():
        found = draw.given(logits, tokens, temperature=temperature)
        largest, total = found.largest, found.totals
    else:
        largest = row_max(logits)
        total = sum_in_any_order(jnp.exp(_exponents(logits, largest, temperature)))
    logit = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    return _exponents(logit, largest, temperature)[:, 0] - jnp.log1p(total - 1)


def _exponents(
    logits: Float32[Array, "R n"], largest: Float32[Array, " R"], temperature: Float32[Array, " R"]
) -> Float32[Array, "R n"]:
    largest = largest[:, None]
    return jnp.where(logits == largest, 0, logits - largest) / temperature[:, None]  # inf - inf would be NaN


@token_logprobs.defjvp
def _derivative(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (logits, tokens, temperature), (change, _, _) = primals, tangents
    change = change / temperature[:, None]
    of_token = jnp.take_along_axis(change, tokens[:, None], axis=1, mode="clip")[:, 0]
    share = jax.nn.softmax(logits / temperature[:, None], axis=1)
    return token_logprobs(*primals), of_token - jnp.sum(share * change, axis=1)
