"""Weights in blocks: 4 or 8 bits per value, and a scale for every 32 (or more) consecutive inputs of a column.

Sources: the formats Q4_0, Q4_1, Q4_K and Q8_0 of GGUF, the group-wise formats of GPTQ (arXiv:2210.17323) and AWQ
(arXiv:2306.00978), and the microscaling formats of OCP (arXiv:2310.10537) are all of this form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_dtypes import bfloat16, float4_e2m1fn, float8_e4m3fn

from pallas_kernels.aligned import aligned_empty
from pallas_kernels.matmul import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Float32, Int, Shaped, UInt8

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Inputs of a block that the native kernel knows."""
INT4_BLOCK = 32
"""Inputs of a block in `quantize_int4`."""
# Also in blocks.h.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The numbers that NF4 indexes: quantiles of a normal distribution (QLoRA, arXiv:2305.14314)."""
# The name and the bits of the values of a dtype: a number of 4 bits fills a byte of an array.
_NUMBERS = {
    np.dtype(np.uint8): ("uint4", 4),
    np.dtype(np.int8): ("int8", 8),
    np.dtype(float4_e2m1fn): ("float4_e2m1fn", 4),
    np.dtype(float8_e4m3fn): ("float8_e4m3fn", 8),
}
_BITS = {**dict(_NUMBERS.values()), "nf4": 4}
_SCALE_BITS = {"float8_e8m0fnu": 8, "float16": 16, "float32": 32}


class BlockFormat(NamedTuple):
    """How blocks are stored."""

    numbers: str
    """What the values are: "uint4", "int8", "float4_e2m1fn", "float8_e4m3fn" or "nf4"."""
    has_offsets: bool
    scale_dtype: str
    size: int
    """Inputs of a block."""

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return _BITS[self.numbers]

    @property
    def bits_with_scales(self) -> float:
        """Bits of memory per value, with its share of the scale and of the offset."""
        return self.bits + _SCALE_BITS[self.scale_dtype] * (1 + self.has_offsets) / self.size

    @property
    def number(self) -> int:
        """The number of this format in the native kernel, regardless of the size of its blocks."""
        return _FORMATS[self[:3]]


# The same numbers are in blocks.h.
_FORMATS = {
    ("uint4", False, "float16"): 0,
    ("uint4", True, "float16"): 1,
    ("uint4", True, "float32"): 2,
    ("int8", False, "float16"): 3,
    ("int8", False, "float32"): 4,
    ("int8", True, "float32"): 5,
    ("float4_e2m1fn", False, "float8_e8m0fnu"): 6,
    ("float4_e2m1fn", False, "float32"): 7,
    ("float8_e4m3fn", False, "float32"): 8,
    ("nf4", False, "float32"): 9,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockWeight:
    """A weight [K, N] on the host: w[k, n] = scales[n, k // size] * values[n, k] + offsets[n, k // size].

    In float32; with offsets, the products are exact in all formats that are known, whose scales have at most 20 significant
    bits.

    Attributes:
      values: [N, K]: 0 to 15 in uint8 for 4 bits, int8 for 8 bits, or float4_e2m1fn or float8_e4m3fn.
      scales: [N, K / size], float16 or float32; powers of two may be float8_e8m0fnu.
      offsets: like `scales`. None: zero, but for integers of 4 bits -8 times the scale.
      is_nf4: the values, in uint8, are indices of `NF4`.
    """

    values: Shaped[np.ndarray, "N K"]
    scales: Shaped[np.ndarray, "N blocks"]
    offsets: Float[np.ndarray, "N blocks"] | None = None
    is_nf4: bool = False

    def __post_init__(self) -> None:
        n, k = self.values.shape
        if self.values.dtype not in _NUMBERS:
            raise ValueError(
                f"values are {self.values.dtype}, but must be uint8 (4 bits), int8 (8 bits), float4_e2m1fn or float8_e4m3fn"
            )
        if self.scales.ndim != 2 or self.scales.shape[0] != n or k % self.scales.shape[1]:
            raise ValueError(f"scales are {list(self.scales.shape)}, but must be [{n}, K / size] for values [{n}, {k}]")
        if self.size not in BLOCK_SIZES:
            raise ValueError(f"blocks have {self.size} inputs; supported: {', '.join(map(str, BLOCK_SIZES))}")
        if self.offsets is not None and (self.offsets.shape, self.offsets.dtype) != (self.scales.shape, self.scales.dtype):
            raise ValueError(f"offsets are {self.offsets.dtype}{list(self.offsets.shape)}, unlike the scales")
        if self.format[:3] not in _FORMATS:
            known = "; ".join(f"{numbers} with {kind} scales{', offsets' * on}" for numbers, on, kind in _FORMATS)
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
        numbers = "nf4" if self.is_nf4 else _NUMBERS[self.values.dtype][0]
        return BlockFormat(numbers, self.offsets is not None, self.scales.dtype.name, self.size)

    @property
    def implied_offset(self) -> int:
        """What a value is counted from if there are no offsets, in units of the scale."""
        return -8 if self.format.numbers == "uint4" else 0

    def dequantize(self) -> Float32[np.ndarray, "K N"]:
        """The matrix that the blocks stand for."""
        n, k = self.values.shape
        scales = self.scales.astype(np.float32)
        values = NF4[self.values] if self.is_nf4 else self.values.astype(np.float32)
        values = values.reshape(n, scales.shape[1], -1)
        values *= scales[..., None]
        if self.offsets is not None:
            values += self.offsets.astype(np.float32)[..., None]
        elif self.implied_offset:
            values += self.implied_offset * scales[..., None]
        return values.reshape(n, k).T

    def columns(self, order: Int[np.ndarray, " columns"]) -> BlockWeight:
        """The weight with these columns, in this order."""
        offsets = None if self.offsets is None else self.offsets[order]
        return replace(self, values=self.values[order], scales=self.scales[order], offsets=offsets)


def concatenate(weights: Sequence[BlockWeight]) -> BlockWeight:
    """The columns of several weights of one format, side by side."""
    if len(weights) == 1:
        return weights[0]
    offsets = [weight.offsets for weight in weights if weight.offsets is not None]
    return replace(
        weights[0],
        values=np.concatenate([weight.values for weight in weights]),
        scales=np.concatenate([weight.scales for weight in weights]),
        offsets=np.concatenate(offsets) if offsets else None,
    )


def widen(w: BlockWeight, size: int, bits: int) -> BlockWeight:
    """The same weight in 4 or 8 bits, with a scale and an offset in float32 for every `size` inputs, which divides `w.size`.

    ValueError if its values are not integers of at most so many bits.
    """
    if w.format.numbers not in ("uint4", "int8") or w.format.bits > bits:
        raise ValueError(
            f"blocks of {w.format.numbers} have no equal in integers of {bits} bits; leave them as they are, or dequantize"
        )
    scales = w.scales.astype(np.float32)
    offsets = w.implied_offset * scales if w.offsets is None else w.offsets.astype(np.float32)
    scales, offsets = (array.repeat(w.size // size, axis=1) for array in (scales, offsets))
    return BlockWeight(values=w.values if bits == 4 else w.values.view(np.int8), scales=scales, offsets=offsets)


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
    arrays = [_storable(array) for array in (w.scales, w.offsets) if array is not None]
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


def _storable(scales: Shaped[np.ndarray, "N blocks"]) -> Shaped[np.ndarray, "N blocks"]:
    """Exponents as bytes: they have no zero, with which panels are padded."""
    return scales.view(np.uint8) if scales.dtype.itemsize == 1 else scales


def rounds_to_bfloat16(dtype: np.dtype) -> bool:
    """Whether products with weights that stand for `dtype` are those of bfloat16: if the CPU multiplies it."""
    return dtype == bfloat16 and cpu.narrow_group() == 2
