"""How the weights of all groups are stored for `grouped_matmul`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aligned import aligned_empty
from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.matmul import (
    BlockFormat,
    BlockWeight,
    Int8Weight,
    ScaledWeight,
    pack_int4,
    quantize_int4,
    quantize_int8,
)
from pallas_kernels.matmul.blocks import pack, rounds_to_bfloat16
from pallas_kernels.pytree import pytree, static

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int, Num


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockGroups:
    """Weights [G, K, N] on the host, each a `BlockWeight` of one format; each is read when it is used, and released."""

    shape: tuple[int, int, int]
    read: Callable[[int], BlockWeight]
    """The weight [K, N] of a group."""

    def dequantize(self, dtype: DTypeLike = np.float32) -> Float[np.ndarray, "G K N"]:
        """The matrices that the blocks stand for, read one after another."""
        whole = np.empty(self.shape, jnp.dtype(dtype))
        for group in range(len(whole)):
            whole[group] = self.read(group).dequantize()
        return whole


@pytree
class PackedGroups:
    """Weights [G, K, N] in the layout of this CPU's native kernel. They cannot be saved or differentiated.

    Their arrays may have a leading layer axis; see `matmul.PackedWeight`.

    Attributes:
      panels: float32, bfloat16 or int8 [..., G, P, steps, width, group]; panel p of a group holds output columns
        [p * width, (p + 1) * width), or width / 2 columns of gate and the same of up when gated; a step is defined as in
        `matmul.PackedWeight`. In blocks, uint8 [..., G, P, K / size, bytes of a block, 1].
      scales: float32[..., G, P, width] when the panels are int8, else float32[..., 0].
      num_inputs: K.
      num_outputs: columns of the result: N, or F = N / 2 when gated.
      gated: made for `grouped_swiglu`, not for `grouped_matmul`.
      blocks: how blocks are stored, if the panels hold blocks.
      rounds: as for `matmul.PackedWeight`.
      layer: i32 scalar, the selected layer; None: the weights of all layers, or weights without a layer axis.
    """

    panels: Num[Array, "*layers G P steps width group"]
    scales: Float32[Array, "*layers G P width"] | Float32[Array, "*layers 0"]
    num_inputs: int = static()
    num_outputs: int = static()
    gated: bool = static()
    blocks: BlockFormat | None = static(default=None)
    rounds: bool = static(default=False)
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(G, K, N) of the weights that were packed, or (L, G, K, N) of those of all layers."""
        layers = () if self.layer is not None else self.panels.shape[:-5]
        return *layers, self.panels.shape[-5], self.num_inputs, self.num_outputs * (1 + self.gated)

    def at_layer(self, layer: int | jax.Array) -> PackedGroups:
        """The weights [G, K, N] of one layer, in the same memory; see `matmul.PackedWeight.at_layer`."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))


GroupedWeight = jax.Array | ScaledWeight | PackedGroups


def prepare(
    w: np.ndarray | jax.Array | Int8Weight | BlockGroups,
    *,
    quantize: str | None = None,
    platform: str,
    gated: bool = False,
    dtype: DTypeLike | None = None,
) -> GroupedWeight:
    """The form of `w` that `grouped_matmul` (`grouped_swiglu` when `gated`) multiplies with fastest on `platform`.

    On a CPU with native kernels this is `PackedGroups`, in bfloat16 if `w` is bfloat16 and otherwise in float32.
    Elsewhere it is the unchanged array, or an `Int8Weight`. Int8 is rounded to nearest, with one scale per group and
    output column. Int4 is `quantize_int4` of each group, elsewhere as an `Int4Weight`. `BlockGroups` keep their bits there,
    and elsewhere become an array of `dtype`.

    Args:
      w: [G, K, N], floating point or already quantized; when `gated`, [G, K, 2F] with gate columns before up columns.
      quantize: None, "int8" or "int4".
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu".
      gated: the weights are for `grouped_swiglu`.
      dtype: as for `matmul.prepare`: that of the matrices that blocks stand for (default: float32).
    """
    if len(w.shape) != 3:
        raise ValueError(f"w has shape {w.shape}, but must be [G, K, N], one matrix per group")
    if isinstance(w, Int8Weight):
        quantize = "int8"
    elif isinstance(w, BlockGroups):
        if quantize is not None:
            raise ValueError(
                f"the weights are in blocks already, so quantize must be None, not {quantize!r}; dequantize them first"
            )
    elif not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w has dtype {w.dtype}, but must be floating point; pass quantize='int8' to get int8 weights")
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {quantize!r}, but must be None, 'int8' or 'int4'")
    if platform not in ("cpu", "gpu", "cuda", "rocm", "tpu"):
        raise ValueError(f"platform is {platform!r}, but must be 'cpu', 'gpu', 'cuda', 'rocm' or 'tpu'")
    if gated and w.shape[2] % 2:
        raise ValueError(f"a gated w is [gate | up], so its width must be even, not {w.shape[2]}")

    packed = platform == "cpu" and cpu.available()
    whole = jnp.float32 if dtype is None else dtype
    if quantize == "int4":
        w = _quantized(np.asarray(w))
        if not packed:
            kind = np.float32 if platform == "tpu" else None
            each = [pack_int4(w.read(group), scale_dtype=kind) for group in range(w.shape[0])]
            return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *each)
    if isinstance(w, BlockGroups):
        return _packed_blocks(w, gated=gated, dtype=whole) if packed else jnp.asarray(w.dequantize(whole))
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


def _quantized(w: np.ndarray) -> BlockGroups:
    groups, k, n = w.shape
    return BlockGroups(shape=(groups, k, n), read=lambda group: quantize_int4(w[group]))


def _packed_blocks(w: BlockGroups, *, gated: bool, dtype: DTypeLike) -> PackedGroups:
    groups, k, n = w.shape
    form: BlockFormat | None = None
    panels = np.empty(0, np.uint8)
    for group in range(groups):
        weight = w.read(group)
        packed = pack(weight, gated=gated)
        if form is None:
            form, panels = weight.format, aligned_empty((groups, *packed.shape), np.uint8)
        if (weight.shape, weight.format) != ((k, n), form):
            raise ValueError(
                f"the weight of group {group} is {weight.format} {weight.shape}, but that of group 0 is {form} {(k, n)}; "
                "one kernel call reads blocks of one format"
            )
        panels[group] = packed
        del weight, packed  # before the next one is read
    host = jax.devices("cpu")[0]
    return PackedGroups(
        panels=jax.device_put(panels, host),
        scales=jax.device_put(np.zeros(0, np.float32), host),
        num_inputs=k,
        num_outputs=n // (1 + gated),
        gated=gated,
        blocks=form,
        rounds=rounds_to_bfloat16(jnp.dtype(dtype)),
    )
