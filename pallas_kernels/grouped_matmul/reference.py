"""The definition of a grouped matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels.matmul import Float8Weight, Int4Weight, Int8Weight, ScaledWeight
from pallas_kernels.matmul.weights import unscaled

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    x: Float[Array, "T E"],
    w: Float[Array, "G E F"] | ScaledWeight,
    group_sizes: Int[Array, " X"],
    first_group: Int[Array, ""],
) -> Float[Array, "T F"]:
    """float32[T, F]: multiplies every row by every weight and selects its group's result. X times the work; for tests."""
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")  # X for rows past the last group
    # Rows past the last group are multiplied too, by the last weight; their results are replaced by zero.
    index = first_group + jnp.minimum(group, group_sizes.shape[0] - 1)
    w = w.dequantize() if isinstance(w, Int4Weight) else w
    values = w.values if isinstance(w, ScaledWeight) else w
    values = unscaled(w, values, w.scales) if isinstance(w, Float8Weight) else values
    products = jnp.einsum("te,gef->tgf", x.astype(jnp.float32), values.astype(jnp.float32))
    y = jnp.take_along_axis(products, index[:, None, None], axis=1)[:, 0]
    if isinstance(w, Int8Weight) or (isinstance(w, Float8Weight) and not w.in_blocks):
        y = y * w.scales[index]
    return jnp.where(group[:, None] < group_sizes.shape[0], y, 0.0)
