"""A plain weight paired with its panels: the products of the native CPU kernel, with derivatives.

The panels are made within the program, so that the weight can be the argument of a derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import cpu
from pallas_kernels.matmul.weights import PackedWeight
from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@pytree
class PairedWeight:
    """A weight [K, N] for `linear` or `swiglu` whose products have the bits of its `PackedWeight` and a derivative."""

    plain: Float[Array, "K N"]
    packed: PackedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain.shape


def pair(w: Float[Array, "K N"], *, platform: str, gated: bool = False) -> Float[Array, "K N"] | PairedWeight:
    """`w` as `linear` (`swiglu` when `gated`) multiplies with it after `prepare`, but differentiable.

    On a CPU with native kernels this is a `PairedWeight`, whose panels are a copy of `w` made at this point of the program;
    elsewhere it is `w`. As in `prepare`, bfloat16 stays bfloat16 and everything else becomes float32.

    Args:
      w: [K, N], floating point; when `gated`, [K, 2F] with gate columns before up columns.
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu": the one that the program is for.
      gated: the weight is for `swiglu`.
    """
    if platform != "cpu" or not cpu.ensure_loaded():
        return w
    kept = w if w.dtype == jnp.bfloat16 else w.astype(jnp.float32)
    packed = PackedWeight(
        panels=panels(jax.lax.stop_gradient(kept), gated),
        scales=None,
        num_inputs=w.shape[0],
        num_outputs=w.shape[1] // (1 + gated),
        gated=gated,
    )
    return PairedWeight(plain=kept, packed=packed)


def panels(w: jax.Array, gated: bool) -> jax.Array:
    """`cpu.pack` within a program."""
    group = cpu.narrow_group() if w.dtype == jnp.bfloat16 else 1
    width = cpu.panel_width() // (1 + gated)

    def of(part: jax.Array) -> jax.Array:
        depth, columns = part.shape
        part = jnp.pad(part, ((0, -depth % group), (0, -columns % width)))
        return part.reshape(part.shape[0] // group, group, -1, width).transpose(2, 0, 3, 1)

    return jnp.concatenate([of(part) for part in (jnp.split(w, 2, axis=1) if gated else [w])], axis=2)
