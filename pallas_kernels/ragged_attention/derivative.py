"""The derivative of attention: kernels and loops with dynamic bounds have none of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.ragged_attention.quantized import QuantizedCache


def with_derivative(function: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, differentiated forward and backward as `reference` is, which has the same arguments and results.

    The arguments are arrays; the fourth is the cache of keys. Where a derivative is taken, the results are the
    reference's too.
    """
    differentiable = jax.custom_jvp(lambda *arrays: function(*arrays))

    @differentiable.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        if isinstance(primals[3], QuantizedCache):
            raise ValueError(
                f"a KV cache of {primals[3].dtype} has no derivative, because numbers are rounded on their way into it; "
                "differentiate with a cache of float32 or bfloat16"
            )
        return jax.jvp(reference, primals, tangents)

    return differentiable
