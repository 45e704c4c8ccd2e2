"""How weights are stored for `linear`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from ml_dtypes import float8_e4m3fn

from pallas_kernels.matmul import blocks, cpu
from pallas_kernels.matmul.blocks import BlockFormat, BlockWeight
from pallas_kernels.matmul.division import Division
from pallas_kernels.matmul.int4 import Int4Weight, pack_int4
from pallas_kernels.matmul.narrow import LARGEST_FLOAT8, LARGEST_INT8
from pallas_kernels.pytree import pytree, static

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int, Int8, Num

FLOAT8_BLOCK = 128
"""Inputs of a `Float8Weight` that have a scale of their own, if it is in blocks."""


@pytree
class Int8Weight:
    """w[k, n] = values[k, n] * scales[n]; activations stay in floating point, unless `rounds_rows`.

    Both arrays may have a leading layer axis, which `lax.scan` or indexing removes, by a copy on a GPU; see `at_layer`.

    Attributes:
      values: int8[..., K, N] in [-127, 127]; with `inputs_last` [..., N, K].
      scales: float32[..., N], positive.
      layer: i32 scalar, the selected layer; None: the weights of all layers, or a weight without a layer axis.
      division: over which devices `linear` runs a kernel, which XLA cannot divide; None: it does not have to.
      rounds_rows: int8 is multiplied by int8, with rows of x as `narrow.int8_rows`; its derivative is not.
      inputs_last: `linear` and `swiglu` multiply as in `halves`, rows of x rounded to 16 bits; no other product takes it.
    """

    values: Int8[Array, "*layers K N"]
    scales: Float32[Array, "*layers N"]
    layer: Int[Array, ""] | None = None
    division: Division | None = static(default=None)
    rounds_rows: bool = static(default=False)
    inputs_last: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N) of a layer, or (L, K, N) of all layers."""
        *layers, first, last = self.values.shape if self.layer is None else self.values.shape[1:]
        return (*layers, last, first) if self.inputs_last else (*layers, first, last)

    @property
    def inputs_first(self) -> Int8[Array, "*layers K N"]:
        """The values [..., K, N]."""
        return jnp.swapaxes(self.values, -1, -2) if self.inputs_last else self.values

    def at_layer(self, layer: int | jax.Array) -> Int8Weight:
        """The weight [K, N] of one layer, in the same memory, for `linear` and `swiglu` where `reads_in_place` holds."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))


@pytree
class Float8Weight:
    """w[k, n] = values[n, k] * scales[n], or * scales[k // 128, n]; a device that multiplies 8-bit floats rounds activations
    to them, too: a GPU always, a TPU unless there are scales of blocks.

    Both arrays may have a leading layer axis, as in `Int8Weight`.

    Attributes:
      values: float8_e4m3fn[..., N, K]: tensor cores read 8-bit floats with their inputs adjacent.
      scales: float32[..., N], positive; or, if K is a multiple of 128, [..., K / 128, N].
      layer: as in `Int8Weight`.
      division: as in `Int8Weight`.
    """

    values: Float[Array, "*layers N K"]
    scales: Float32[Array, "*scales N"]
    layer: Int[Array, ""] | None = None
    division: Division | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N) of a layer, or (L, K, N) of all layers."""
        layers = self.values.shape[:-2] if self.layer is None else self.values.shape[1:-2]
        return (*layers, self.values.shape[-1], self.values.shape[-2])

    @property
    def in_blocks(self) -> bool:
        """Whether every 128 inputs of an output have a scale of their own."""
        return self.scales.ndim == self.values.ndim

    def at_layer(self, layer: int | jax.Array) -> Float8Weight:
        """The weight [K, N] of one layer, in the same memory; see `Int8Weight.at_layer`."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))


def inputs_last(w: object) -> bool:
    """Whether the last axis of the values are the inputs."""
    return isinstance(w, Float8Weight) or (isinstance(w, Int8Weight) and w.inputs_last)


def unscaled(w: Float8Weight, values: jax.Array, scales: jax.Array) -> jax.Array:
    """float32[..., K, N]: some matrices of `w` without their scales if these are of outputs, and with those of blocks."""
    wide = jnp.swapaxes(values, -1, -2).astype(jnp.float32)
    return wide * jnp.repeat(scales, FLOAT8_BLOCK, axis=-2) if w.in_blocks else wide


@pytree
class PackedWeight:
    """A weight [K, N] in the layout of this CPU's native kernel. It cannot be saved or differentiated.

    Its arrays may have a leading layer axis. `at_layer` then selects the weight of one layer without copying it; indexing
    and `lax.scan` remove the axis by a copy.

    Attributes:
      panels: float32, bfloat16 or int8 [..., P, steps, width, group]; panel p holds output columns
        [p * width, (p + 1) * width), or width / 2 columns of gate and the same of up when gated; a step has one value
        per column, or two adjacent values along K if the CPU multiplies pairs (`cpu.narrow_group`).
        In blocks, uint8 [..., P, K / size, bytes of a block, 1].
      scales: float32[..., P, width] when the panels are int8, else None.
      num_inputs: K.
      num_outputs: columns of the result: N, or F = N / 2 when gated.
      gated: made for `swiglu`, not for `linear`.
      blocks: how blocks are stored, if the panels hold blocks.
      rounds: with blocks, values and activations are rounded to bfloat16 before they are multiplied.
      layer: i32 scalar, the selected layer; None: the weights of all layers, or a weight without a layer axis.
    """

    panels: Num[Array, "*layers P steps width group"]
    scales: Float32[Array, "*layers P width"] | None
    num_inputs: int = static()
    num_outputs: int = static()
    gated: bool = static()
    blocks: BlockFormat | None = static(default=None)
    rounds: bool = static(default=False)
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N) of the weight that was packed, or (L, K, N) of those of all layers."""
        layers = () if self.layer is not None else self.panels.shape[:-4]
        return *layers, self.num_inputs, self.num_outputs * (1 + self.gated)

    def at_layer(self, layer: int | jax.Array) -> PackedWeight:
        """The weight [K, N] of one layer, in the same memory. A program that reads a layer outside [0, L) fails."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))


ScaledWeight = Int8Weight | Int4Weight | Float8Weight
"""Weights of 8 or 4 bits with scales, for accelerators."""
Weight = jax.Array | ScaledWeight | PackedWeight


def prepare(
    w: np.ndarray | jax.Array | Int8Weight | BlockWeight,
    *,
    quantize: str | None = None,
    platform: str,
    gated: bool = False,
    dtype: DTypeLike | None = None,
) -> Weight:
    """The form of `w` that `linear` (`swiglu` when `gated`) multiplies with fastest on `platform`.

    On a CPU with native kernels this is a `PackedWeight`, in bfloat16 if `w` is bfloat16 and otherwise in float32. If the
    CPU multiplies bfloat16 (AVX512_BF16), activations are rounded to bfloat16 before they are multiplied by a bfloat16
    or int8 weight. Elsewhere it is the unchanged array, or an `Int8Weight`. Int8 is rounded to nearest, with one scale per
    output column; the error of a weight is at most half a scale, max|column| / 254. Int4 is `quantize_int4`, elsewhere
    as an `Int4Weight`. A `BlockWeight` keeps its bits there, and elsewhere becomes an array of `dtype`.

    Args:
      w: [K, N], floating point or already quantized; when `gated`, [K, 2F] with gate columns before up columns.
      quantize: None, "int8" or "int4".
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu".
      gated: the weight is for `swiglu`.
      dtype: that of the matrix that a `BlockWeight` or an int4 weight stands for (default: float32). With bfloat16, products
        are those of bfloat16 if the CPU multiplies it. Other weights have their own dtype.
    """
    if isinstance(w, BlockWeight) and quantize is not None:
        raise ValueError(f"the weight is in blocks already, so quantize must be None, not {quantize!r}; dequantize it first")
    if len(w.shape) != 2:
        raise ValueError(f"w has shape {w.shape}, but must be [K, N]; prepare stacked weights one by one")
    if isinstance(w, Int8Weight):
        quantize = "int8"
    elif not isinstance(w, BlockWeight) and not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w has dtype {w.dtype}, but must be floating point; pass quantize='int8' to get int8 weights")
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {quantize!r}, but must be None, 'int8' or 'int4'")
    if platform not in ("cpu", "gpu", "cuda", "rocm", "tpu"):
        raise ValueError(f"platform is {platform!r}, but must be 'cpu', 'gpu', 'cuda', 'rocm' or 'tpu'")
    if gated and w.shape[1] % 2:
        raise ValueError(f"a gated w is [gate | up], so its width must be even, not {w.shape[1]}")

    packed = platform == "cpu" and cpu.ensure_loaded()
    if quantize == "int4":
        small = blocks.quantize_int4(np.asarray(w))
        if not packed:
            # float16 is not a dtype of TPUs.
            kind = np.float32 if platform == "tpu" else None
            return jax.tree.map(jnp.asarray, pack_int4(small, scale_dtype=kind))
        return _packed_blocks(small, gated=gated, dtype=dtype or jnp.float32)
    if isinstance(w, BlockWeight):
        whole = jnp.float32 if dtype is None else dtype
        return _packed_blocks(w, gated=gated, dtype=whole) if packed else jnp.asarray(w.dequantize(), whole)
    if isinstance(w, Int8Weight):
        values, scales = np.asarray(w.values), np.asarray(w.scales)
    elif quantize is None and not packed:
        return jnp.asarray(w)
    elif quantize is None:
        host = np.asarray(w)
        kept = host if host.dtype == jnp.bfloat16 else host.astype(np.float32)
        return _packed(kept, None, gated=gated)
    else:
        values, scales = quantize_int8(np.asarray(w))
    if packed:
        return _packed(values, scales, gated=gated)
    return Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))


def quantize_int8(
    w: Float[np.ndarray, "*groups K N"],
) -> tuple[Int8[np.ndarray, "*groups K N"], Float32[np.ndarray, "*groups N"]]:
    """(int8[..., K, N], float32[..., N]) whose product is nearest to `w`, one scale per output column."""
    wide = w.astype(np.float32)
    largest = np.abs(wide).max(axis=-2)
    if not np.isfinite(largest).all():
        raise ValueError("w has infinite or NaN values, which int8 cannot represent; check the checkpoint")
    # A column of zeros has values 0 with any scale.
    scales = np.where(largest > 0, largest / LARGEST_INT8, 1).astype(np.float32)
    values = np.clip(np.rint(wide / scales[..., None, :]), -LARGEST_INT8, LARGEST_INT8)
    return values.astype(np.int8), scales


def quantize_float8(
    w: Float[np.ndarray, "*groups K N"],
) -> tuple[Float[np.ndarray, "*groups N K"], Float32[np.ndarray, "*groups N"]]:
    """(float8_e4m3fn[..., N, K], float32[..., N]) whose product is nearest to `w`, one scale per output column."""
    wide = np.swapaxes(w, -1, -2).astype(np.float32)
    largest = np.abs(wide).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("w has infinite or NaN values, which fp8 cannot represent; check the checkpoint")
    scales = np.where(largest > 0, largest / LARGEST_FLOAT8, 1).astype(np.float32)
    values = np.clip(wide / scales[..., None], -LARGEST_FLOAT8, LARGEST_FLOAT8)
    return values.astype(float8_e4m3fn), scales


def _packed(w: np.ndarray, scales: np.ndarray | None, *, gated: bool) -> PackedWeight:
    host = jax.devices("cpu")[0]
    packed_scales = None if scales is None else cpu.pack_scales(scales, gated=gated)
    return PackedWeight(
        panels=jax.device_put(cpu.pack(w, gated=gated), host),
        scales=None if packed_scales is None else jax.device_put(packed_scales, host),
        num_inputs=w.shape[0],
        num_outputs=w.shape[1] // (1 + gated),
        gated=gated,
    )


def _packed_blocks(w: BlockWeight, *, gated: bool, dtype: DTypeLike) -> PackedWeight:
    k, n = w.shape
    return PackedWeight(
        panels=jax.device_put(blocks.pack(w, gated=gated), jax.devices("cpu")[0]),
        scales=None,
        num_inputs=k,
        num_outputs=n // (1 + gated),
        gated=gated,
        blocks=w.format,
        rounds=blocks.rounds_to_bfloat16(jnp.dtype(dtype)),
    )
