"""Packed numbers as arrays: bit fields, small floats, and values in groups with a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight
    from pallas_kernels.matmul.blocks import BlockFormat

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array((*_HALF, *(-value for value in _HALF)), np.float32)
"""The values of 4-bit floats: the fourth bit is the sign."""
E8M0_BIAS = 127
_ROWS = 256  # outputs that are dequantized at a time, so that temporaries are small


def unpack_bits(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """u8[..., count] of unsigned numbers of 1 to 8 bits, stored without gaps along the last axis from the lowest bit.

    `words` is an array of any integer type; a number may begin in one word and end in the next.
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream[..., :count]
    if 8 % bits == 0:
        each = 8 // bits
        out = np.empty((*stream.shape[:-1], stream.shape[-1] * each), np.uint8)
        for i in range(each):
            out[..., i::each] = (stream >> (bits * i)) & (2**bits - 1)
        return out[..., :count]
    # Eight numbers fill `bits` bytes. The last group may be incomplete, and the last number of a group ends at its end.
    lead, size = stream.shape[:-1], stream.shape[-1]
    groups = np.zeros((*lead, -(-size // bits) * bits + 1), np.uint16)
    groups[..., :size] = stream
    out = np.empty((*lead, groups.shape[-1] // bits, 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        low, high = groups[..., byte:-1:bits], groups[..., byte + 1 :: bits]
        out[..., i] = ((low | (high[..., : low.shape[-1]] << 8)) >> shift) & (2**bits - 1)
    return out.reshape(*lead, -1)[..., :count]


def unpack_sequential(words: np.ndarray, bits: int) -> np.ndarray:
    """u8[..., numbers] of words that each hold as many whole numbers as fit, from the lowest; the other bits are unused."""
    each = 8 * words.dtype.itemsize // bits
    shifts = bits * np.arange(each, dtype=np.uint32)
    wide = words.view(f"u{words.dtype.itemsize}").astype(np.uint32)
    return ((wide[..., None] >> shifts) & (2**bits - 1)).astype(np.uint8).reshape(*words.shape[:-1], -1)


def fp4(packed: np.ndarray) -> np.ndarray:
    """float4_e2m1fn[..., 2 n] of u8[..., n]: two numbers in each byte, the first in the low bits."""
    return unpack_bits(packed, 4, 2 * packed.shape[-1]).view(ml_dtypes.float4_e2m1fn)


def e8m0(exponents: np.ndarray) -> np.ndarray:
    """The powers of two that 8-bit exponents stand for, float8_e8m0fnu."""
    return exponents.view(ml_dtypes.float8_e8m0fnu)


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """A matrix [out, in] of quantized numbers in groups of inputs: (number - zero) * scale + bias."""

    shape: tuple[int, int]
    rows: Callable[[slice], np.ndarray]
    """The numbers of some outputs, [some, in]."""
    scales: np.ndarray
    """[out, groups]."""
    zeros: np.ndarray | float | None = None
    """[out, groups], or one for all."""
    biases: np.ndarray | None = None
    """[out, groups]."""
    group: np.ndarray | None = None
    """i32[in]: the group of each input. None: consecutive groups of equal size."""
    bits: int | None = None
    """Of unsigned numbers, or of signed ones if there are no zeros. None: the numbers are floats of 4 or 8 bits."""
    table: np.ndarray | None = None
    """float32[16]: the numbers, in uint8, are indices of it."""

    def values(self) -> np.ndarray:
        """float32[out, in]."""
        out = np.empty(self.shape, np.float32)
        for start in range(0, self.shape[0], _ROWS):
            some = slice(start, min(start + _ROWS, self.shape[0]))
            numbers = _wide(self.rows(some)) if self.table is None else self.table[self.rows(some)]
            if self.group is None:
                numbers = numbers.reshape(len(numbers), self.scales.shape[1], -1)
            if self.zeros is not None:
                numbers -= self._spread(self.zeros, some) if isinstance(self.zeros, np.ndarray) else np.float32(self.zeros)
            numbers *= self._spread(self.scales, some)
            if self.biases is not None:
                numbers += self._spread(self.biases, some)
            out[some] = numbers.reshape(some.stop - start, -1)
        return out

    def _spread(self, of_groups: np.ndarray, some: slice) -> np.ndarray:
        wide = of_groups[some].astype(np.float32)
        return wide[:, :, None] if self.group is None else wide[:, self.group]

    def block_kind(self) -> BlockKind | None:
        """How `blocks` stores the matrix; None if no kernel multiplies it without rounding its values."""
        form = self._block_format()
        if form is None:
            return None
        wide = form.scale_dtype == "float32"
        what = f" and {'float32 ' * wide}offsets" if form.has_offsets else ""
        numbers = f"{form.bits} bits" if self.bits is not None else f"{form.bits}-bit floats"
        numbers = numbers if self.table is None else "NF4"
        name = f"{numbers}{what} in groups of {form.size}{', float32 scales' * (wide and not form.has_offsets)}"
        return BlockKind(
            name,
            form.bits_with_scales,
            form.size,
            form.bits,
            is_float=self.bits is None,
            has_offsets=form.has_offsets,
            scale_dtype=form.scale_dtype,
            of_outputs=form.numbers == "float8_e4m3fn" and self.scales.shape[1] == 1,
        )

    def _block_format(self) -> BlockFormat | None:
        from pallas_kernels.matmul import BLOCK_SIZES
        from pallas_kernels.matmul.blocks import NF4, BlockFormat

        size, rest = divmod(self.shape[1], self.scales.shape[1])
        scale = self.scales.dtype.name
        is_even = not isinstance(self.zeros, np.ndarray)
        if self.group is not None or rest:
            return None
        if self.table is not None:
            is_kept = size in BLOCK_SIZES and np.array_equal(self.table, NF4)
            return BlockFormat("nf4", False, "float32", size) if is_kept else None
        is_known = size in BLOCK_SIZES
        # A group of another size is divided into blocks.
        size = max((each for each in BLOCK_SIZES if size % each == 0), default=0)
        if self.bits in (8, None) and is_even and self.biases is None:
            numbers = self.rows(slice(0, 1)).dtype.name if self.bits is None else "int8"
            if numbers == "float4_e2m1fn" and is_known:
                return BlockFormat(numbers, False, scale if scale == "float8_e8m0fnu" else "float32", size)
            if size and numbers in ("int8", "float8_e4m3fn"):
                is_half = (numbers, scale) == ("int8", "float16")
                return BlockFormat(numbers, False, "float16" if is_half else "float32", size)
            return None
        if self.bits is None or not size or scale not in ("float16", "bfloat16"):
            return None
        if self.bits != 4:
            return BlockFormat("int8", True, "float32", size) if self.bits < 8 or self.biases is None else None
        if self.biases is None and is_even and scale == "float16":
            return BlockFormat("uint4", False, "float16", size)
        if self.biases is not None and scale == self.biases.dtype.name == "float16":
            return BlockFormat("uint4", True, "float16", size)
        return BlockFormat("uint4", True, "float32", size)

    def blocks(self) -> BlockWeight:
        """The matrix [in, out] in its bits; ValueError if it has no `block_kind`."""
        from pallas_kernels.matmul import BlockWeight

        form = self._block_format()
        if form is None:
            raise ValueError(
                f"a matrix {self.shape} of {self.bits} bits with scales {self.scales.shape} is not kept in blocks"
            )
        values = self.rows(slice(0, self.shape[0]))
        zeros = np.asarray(0 if self.zeros is None else self.zeros, np.float32)
        if self.bits == 8 and values.dtype == np.uint8:
            values, zeros = values ^ 128, zeros - 128
        if form.numbers == "int8":
            values = values.view(np.int8)
        scales = self.scales if self.scales.dtype.name == form.scale_dtype else self.scales.astype(form.scale_dtype)
        offsets = None
        if form.has_offsets:
            offsets = -scales * zeros if self.biases is None else self.biases.astype(form.scale_dtype)
        scales, offsets = (
            each if each is None else np.repeat(each, self.shape[1] // each.shape[1] // form.size, axis=1)
            for each in (scales, offsets)
        )
        assert scales is not None, "a format has scales"
        return BlockWeight(values=values, scales=scales, offsets=offsets, is_nf4=self.table is not None)


def _wide(numbers: np.ndarray) -> np.ndarray:
    """float32; a table is faster than the cast of 4-bit floats."""
    return E2M1[numbers.view(np.uint8)] if numbers.dtype == ml_dtypes.float4_e2m1fn else numbers.astype(np.float32)
