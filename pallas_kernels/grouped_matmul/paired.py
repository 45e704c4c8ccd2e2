"""The plain weights of all groups paired with their panels: the products of the native CPU kernel, with derivatives."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.grouped_matmul.weights import PackedGroups
from pallas_kernels.matmul.paired import panels
from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@pytree
class PairedGroups:
    """Weights [G, K, N] whose products have the bits of their `PackedGroups` and a derivative."""

    plain: Float[Array, "G K N"]
    packed: PackedGroups

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain.shape


def pair(w: Float[Array, "G K N"], *, platform: str, gated: bool = False) -> Float[Array, "G K N"] | PairedGroups:
    """`w` as `grouped_matmul` (`grouped_swiglu` when `gated`) multiplies with it after `prepare`, but differentiable.

    On a CPU with native kernels this is `PairedGroups`, whose panels are a copy of `w` made at this point of the program;
    elsewhere it is `w`. See `matmul.pair`.

    Args:
      w: [G, K, N], floating point; when `gated`, [G, K, 2F] with gate columns before up columns.
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu": the one that the program is for.
      gated: the weights are for `grouped_swiglu`.
    """
    if platform != "cpu" or not cpu.available():
        return w
    kept = w if w.dtype == jnp.bfloat16 else w.astype(jnp.float32)
    packed = PackedGroups(
        panels=jax.vmap(partial(panels, gated=gated))(jax.lax.stop_gradient(kept)),
        scales=jnp.zeros(0, jnp.float32),
        num_inputs=w.shape[1],
        num_outputs=w.shape[2] // (1 + gated),
        gated=gated,
    )
    return PairedGroups(plain=kept, packed=packed)
