"""Weights in blocks: 4 or 8 bits per value, and a scale for every 32 (or more) consecutive inputs of a column.

Sources: the formats Q4_0, Q4_1, Q4_K and Q8_0 of GGUF, and the group-wise formats of GPTQ (arXiv:2210.17323) and AWQ
(arXiv:2306.00978), are all of this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from pallas_kernels.aligned import aligned_empty
from pallas_kernels.matmul import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Float32, Int8, UInt8

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Inputs of a block that the native kernel knows."""
INT4_BLOCK = 32
"""Inputs of a block in `quantize_int4`."""


class BlockFormat(NamedTuple):
    """How blocks are stored."""

    bits: int
    has_offsets: bool
    scale_dtype: str
    size: int

    @property
    def number(self) -> int:
        """The number of this format in the native kernel, regardless of the size of its blocks."""
        return _NUMBERS[self[:3]]


# The same numbers are in cpu.cc.
_NUMBERS = {
    (4, False, "float16"): 0,
    (4, True, "float16"): 1,
    (4, True, "float32"): 2,
    (8, False, "float16"): 3,
    (8, False, "float32"): 4,
    (8, True, "float32"): 5,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockWeight:
    """A weight [K, N] on the host: w[k, n] = scales[n, k // size] * values[n, k] + offsets[n, k // size].

    In float32; with offsets, the products are exact in all formats that are known, whose scales have at most 20 significant
    bits.

    Attributes:
      values: [N, K]: 0 to 15 in uint8 for 4 bits, int8 for 8 bits.
      scales: [N, K / size], float16 or float32.
      offsets: like `scales`. None: zero, but for 4 bits -8 times the scale.
    """

    values: UInt8[np.ndarray, "N K"] | Int8[np.ndarray, "N K"]
    scales: Float[np.ndarray, "N blocks"]
    offsets: Float[np.ndarray, "N blocks"] | None = None

    def __post_init__(self) -> None:
        n, k = self.values.shape
        if self.values.dtype not in (np.uint8, np.int8):
            raise ValueError(f"values are {self.values.dtype}, but must be uint8 (4 bits) or int8 (8 bits)")
        if self.scales.ndim != 2 or self.scales.shape[0] != n or k % self.scales.shape[1]:
            raise ValueError(f"scales are {list(self.scales.shape)}, but must be [{n}, K / size] for values [{n}, {k}]")
        if self.size not in BLOCK_SIZES:
            raise ValueError(f"blocks have {self.size} inputs; supported: {', '.join(map(str, BLOCK_SIZES))}")
        if self.offsets is not None and (self.offsets.shape, self.offsets.dtype) != (self.scales.shape, self.scales.dtype):
            raise ValueError(f"offsets are {self.offsets.dtype}{list(self.offsets.shape)}, unlike the scales")
        if self.format[:3] not in _NUMBERS:
            known = "; ".join(f"{bits} bits with {kind} scales{', offsets' * on}" for bits, on, kind in _NUMBERS)
            raise ValueError(f"blocks of the format {self.format} are not supported; supported: {known}")

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        n, k = self.values.shape
        return k, n

    @property
    def size(self) -> int:
        """Inputs of a block."""
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def format(self) -> BlockFormat:
        """How the blocks are stored."""
        bits = 4 if self.values.dtype == np.uint8 else 8
        return BlockFormat(bits, self.offsets is not None, self.scales.dtype.name, self.size)

    def dequantize(self) -> Float32[np.ndarray, "K N"]:
        """The matrix that the blocks stand for."""
        n, k = self.values.shape
        scales = self.scales.astype(np.float32)
        values = self.values.reshape(n, scales.shape[1], -1).astype(np.float32)
        values *= scales[..., None]
        if self.offsets is not None:
            values += self.offsets.astype(np.float32)[..., None]
        elif self.format.bits == 4:
            values -= 8 * scales[..., None]
        return values.reshape(n, k).T


def concatenate(weights: Sequence[BlockWeight]) -> BlockWeight:
    """The columns of several weights of one format, side by side."""
    if len(weights) == 1:
        return weights[0]
    offsets = [weight.offsets for weight in weights if weight.offsets is not None]
    return BlockWeight(
        values=np.concatenate([weight.values for weight in weights]),
        scales=np.concatenate([weight.scales for weight in weights]),
        offsets=np.concatenate(offsets) if offsets else None,
    )


def widen(w: BlockWeight, size: int) -> BlockWeight:
    """The same weight in 8 bits, with a scale and an offset in float32 for every `size` inputs, which divides `w.size`."""
    scales = w.scales.astype(np.float32)
    offsets = np.zeros_like(scales) if w.offsets is None else w.offsets.astype(np.float32)
    if w.offsets is None and w.format.bits == 4:
        offsets = -8 * scales
    scales, offsets = (array.repeat(w.size // size, axis=1) for array in (scales, offsets))
    return BlockWeight(values=w.values.view(np.int8), scales=scales, offsets=offsets)


def quantize_int4(w: Float[np.ndarray, "K N"]) -> BlockWeight:
    """The weight in 4 bits, in blocks of 32 inputs; K must be a multiple of 32.

    The value of largest magnitude of a block becomes -8 times the scale, as in llama.cpp's Q4_0; of a few scales near that
    one, the one with the smallest squared error is taken.
    """
    k, n = w.shape
    if k % INT4_BLOCK:
        raise ValueError(f"int4 has blocks of {INT4_BLOCK} inputs, but the weight has {k} inputs; use quantize='int8'")
    blocks = np.ascontiguousarray(w.T, np.float32).reshape(n, -1, INT4_BLOCK)
    if not np.isfinite(blocks).all():
        raise ValueError("w has infinite or NaN values, which int4 cannot represent; check the checkpoint")
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    best = np.full(extreme.shape, np.inf, np.float32)
    scales, values = np.zeros(extreme.shape, np.float16), np.full(blocks.shape, 8, np.uint8)
    for share in (-8.0, -7.0, -7.5, -8.5, 7.0, 7.5):  # the value of `extreme` in units of the scale
        scale = (extreme / np.float32(share)).astype(np.float16)
        wide = scale.astype(np.float32)
        q = np.clip(np.rint(blocks / np.where(wide == 0, 1, wide)), -8, 7)
        error = np.square(q * wide - blocks).sum(-1, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        values = np.where(better, (q + 8).astype(np.uint8), values)
    return BlockWeight(values=values.reshape(n, k), scales=scales[..., 0])


def pack(w: BlockWeight, *, gated: bool) -> UInt8[np.ndarray, "P blocks bytes one"]:
    """Panels [P, K / size, bytes of a block, 1] of a matrix [K, N]; `native/blocks.h` says what a block holds."""
    n, k = w.values.shape
    values = np.ascontiguousarray(w.values)
    if w.format.bits == 4:
        pairs = values.view("<u2")  # the first value of each pair is the low byte
        values = (pairs | pairs >> 4).astype(np.uint8)
    arrays = [array for array in (w.scales, w.offsets) if array is not None]
    arrays.append(values.view("<u4"))
    count, parts = k // w.format.size, 1 + gated
    share = cpu.panel_width() // parts
    sizes = [array.shape[1] // count * cpu.panel_width() * array.itemsize for array in arrays]  # bytes in a block
    panels = aligned_empty((-(-n // (parts * share)), count, sum(sizes)), np.uint8)
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        piece = panels[..., start : start + size].view(array.dtype)
        cpu.fill_panels(piece.reshape(*piece.shape[:2], -1, parts, share, 1), array.T)
        start += size
    return panels[..., None]


def rounds_to_bfloat16(dtype: np.dtype) -> bool:
    """Whether products with weights that stand for `dtype` are those of bfloat16: if the CPU multiplies it."""
    return dtype == bfloat16 and cpu.narrow_group() == 2
