"""How the weights of all groups are stored for `grouped_matmul`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.matmul import Int8Weight, quantize_int8
from pallas_kernels.pytree import pytree, static

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int, Num


@pytree
class PackedGroups:
    """Weights [G, K, N] in the layout of this CPU's native kernel. They cannot be saved or differentiated.

    Their arrays may have a leading layer axis; see `matmul.PackedWeight`.

    Attributes:
      panels: float32, bfloat16 or int8 [..., G, P, steps, width, group]; panel p of a group holds output columns
        [p * width, (p + 1) * width), or width / 2 columns of gate and the same of up when gated; a step is defined as in
        `matmul.PackedWeight`.
      scales: float32[..., G, P, width] when the panels are int8, else float32[..., 0].
      num_inputs: K.
      num_outputs: columns of the result: N, or F = N / 2 when gated.
      gated: made for `grouped_swiglu`, not for `grouped_matmul`.
      layer: i32 scalar, the selected layer; None: the weights of all layers, or weights without a layer axis.
    """

    panels: Num[Array, "*layers G P steps width group"]
    scales: Float32[Array, "*layers G P width"] | Float32[Array, "*layers 0"]
    num_inputs: int = static()
    num_outputs: int = static()
    gated: bool = static()
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(G, K, N) of the weights that were packed, or (L, G, K, N) of those of all layers."""
        layers = () if self.layer is not None else self.panels.shape[:-5]
        return *layers, self.panels.shape[-5], self.num_inputs, self.num_outputs * (1 + self.gated)

    def at_layer(self, layer: int | jax.Array) -> PackedGroups:
        """The weights [G, K, N] of one layer, in the same memory; see `matmul.PackedWeight.at_layer`."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))


GroupedWeight = jax.Array | Int8Weight | PackedGroups


def prepare(
    w: np.ndarray | jax.Array | Int8Weight, *, quantize: str | None = None, platform: str, gated: bool = False
) -> GroupedWeight:
    """The form of `w` that `grouped_matmul` (`grouped_swiglu` when `gated`) multiplies with fastest on `platform`.

    On a CPU with native kernels this is `PackedGroups`, in bfloat16 if `w` is bfloat16 and otherwise in float32.
    Elsewhere it is the unchanged array, or an `Int8Weight`. Int8 is rounded to nearest, with one scale per group and
    output column.

    Args:
      w: [G, K, N], floating point or already quantized; when `gated`, [G, K, 2F] with gate columns before up columns.
      quantize: None or "int8".
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu".
      gated: the weights are for `grouped_swiglu`.
    """
    if len(w.shape) != 3:
        raise ValueError(f"w has shape {w.shape}, but must be [G, K, N], one matrix per group")
    if not isinstance(w, Int8Weight) and not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w has dtype {w.dtype}, but must be floating point; pass quantize='int8' to get int8 weights")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}, but must be None or 'int8'")
    if platform not in ("cpu", "gpu", "cuda", "rocm", "tpu"):
        raise ValueError(f"platform is {platform!r}, but must be 'cpu', 'gpu', 'cuda', 'rocm' or 'tpu'")
    if gated and w.shape[2] % 2:
        raise ValueError(f"a gated w is [gate | up], so its width must be even, not {w.shape[2]}")

    packed = platform == "cpu" and cpu.available()
    if isinstance(w, Int8Weight):
        values, scales = np.asarray(w.values), np.asarray(w.scales)
    elif quantize is None and not packed:
        return jnp.asarray(w)
    elif quantize is None:
        host = np.asarray(w)
        return _packed(host if host.dtype == jnp.bfloat16 else host.astype(np.float32), None, gated=gated)
    else:
        values, scales = quantize_int8(np.asarray(w))
    if packed:
        return _packed(values, scales, gated=gated)
    return Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))


def _packed(w: np.ndarray, scales: np.ndarray | None, *, gated: bool) -> PackedGroups:
    host = jax.devices("cpu")[0]
    packed_scales = np.zeros(0, np.float32)
    if scales is not None:
        packed_scales = cpu.pack_scales(scales, gated=gated)
    return PackedGroups(
        panels=jax.device_put(cpu.pack(w, gated=gated), host),
        scales=jax.device_put(packed_scales, host),
        num_inputs=w.shape[1],
        num_outputs=w.shape[2] // (1 + gated),
        gated=gated,
    )
