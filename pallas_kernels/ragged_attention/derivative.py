"""The derivative of attention. Kernels and loops with dynamic bounds have none."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.ragged_attention.arguments import Attention, Results
from pallas_kernels.ragged_attention.quantized import QuantizedCache
from pallas_kernels.ragged_attention.reference import ragged_attention_reference


def with_derivative(attention: Attention) -> Attention:
    """`attention` with the forward- and reverse-mode derivatives of the reference.

    Where a derivative is taken, the reference also computes the results.
    """
    differentiable = jax.custom_jvp(lambda *arguments: attention(*arguments))

    @differentiable.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Results, Results]:
        if isinstance(primals[3], QuantizedCache):
            raise ValueError(
                f"a KV cache of {primals[3].dtype} has no derivative, because numbers are rounded when written to it; "
                "differentiate with a cache of float32 or bfloat16"
            )
        return jax.jvp(ragged_attention_reference, primals, tangents)

    return differentiable
