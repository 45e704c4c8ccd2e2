"""Packed numbers as arrays: bit fields, small floats, and values in groups with a scale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.checkpoint.base import BlockKind

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of the low three bits of a 4-bit float; the fourth is the sign
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
    """float32[..., 2 n] of u8[..., n]: two E2M1 numbers in each byte, the first in the low bits."""
    return _fp4_pairs()[packed].reshape(*packed.shape[:-1], -1)


@functools.cache
def _fp4_pairs() -> np.ndarray:
    number = np.array((*E2M1, *(-value for value in E2M1)), np.float32)
    byte = np.arange(256)
    return np.stack([number[byte & 15], number[byte >> 4]], axis=-1)


def e8m0(exponents: np.ndarray) -> np.ndarray:
    """The powers of two that 8-bit exponents stand for, float32."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - E8M0_BIAS)


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
    """Of unsigned numbers, or of signed ones if there are no zeros. None: the numbers are floats."""

    def values(self) -> np.ndarray:
        """float32[out, in]."""
        out = np.empty(self.shape, np.float32)
        for start in range(0, self.shape[0], _ROWS):
            some = slice(start, min(start + _ROWS, self.shape[0]))
            numbers = self.rows(some).astype(np.float32)
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
        from pallas_kernels.matmul import BLOCK_SIZES

        size, rest = divmod(self.shape[1], self.scales.shape[1])
        scale = self.scales.dtype.name
        is_even = not isinstance(self.zeros, np.ndarray)
        if self.group is not None or rest:
            return None
        if self.bits == 8 and is_even and self.biases is None:
            size = max((each for each in BLOCK_SIZES if size % each == 0), default=0)
            wide = scale != "float16"
            return (
                BlockKind(f"8 bits in groups of {size}{', float32 scales' * wide}", 8 + 16 * (1 + wide) / size, size)
                if size
                else None
            )
        if self.bits is None or size not in BLOCK_SIZES or scale not in ("float16", "bfloat16"):
            return None
        if self.bits != 4:
            kind = BlockKind(f"8 bits and float32 offsets in groups of {size}", 8 + 64 / size, size)
            return kind if self.bits < 8 or self.biases is None else None
        if self.biases is None and is_even and scale == "float16":
            return BlockKind(f"4 bits in groups of {size}", 4 + 16 / size, size)
        if self.biases is not None and scale == self.biases.dtype.name == "float16":
            return BlockKind(f"4 bits and offsets in groups of {size}", 4 + 32 / size, size)
        return BlockKind(f"4 bits and float32 offsets in groups of {size}", 4 + 64 / size, size)

    def _blocks_in_group(self) -> int:
        """Into how many blocks a group of 8 bits is divided, because the kernels know no block of its size."""
        from pallas_kernels.matmul import BLOCK_SIZES

        size = self.shape[1] // self.scales.shape[1]
        return size // max(each for each in BLOCK_SIZES if size % each == 0)

    def blocks(self) -> BlockWeight:
        """The matrix [in, out] in its bits; ValueError if it has no `block_kind`."""
        from pallas_kernels.matmul import BlockWeight

        kind = self.block_kind()
        if kind is None:
            raise ValueError(
                f"a matrix {self.shape} of {self.bits} bits with scales {self.scales.shape} is not kept in blocks"
            )
        numbers = self.rows(slice(0, self.shape[0]))
        zeros = np.asarray(0 if self.zeros is None else self.zeros, np.float32)
        if self.bits == 8 and numbers.dtype == np.uint8:
            numbers, zeros = numbers ^ 128, zeros - 128
        values = numbers if self.bits == 4 else numbers.view(np.int8)
        if self.bits == 8 and "offsets" not in kind.name:
            scales = self.scales.astype(np.float32) if "float32" in kind.name else self.scales
            return BlockWeight(values=values, scales=np.repeat(scales, self._blocks_in_group(), axis=1))
        if "offsets" not in kind.name:
            return BlockWeight(values=values, scales=self.scales)
        if "float32" not in kind.name:
            return BlockWeight(values=values, scales=self.scales, offsets=self.biases)
        scales = self.scales.astype(np.float32)
        offsets = -scales * zeros if self.biases is None else self.biases.astype(np.float32)
        return BlockWeight(values=values, scales=scales, offsets=offsets)
