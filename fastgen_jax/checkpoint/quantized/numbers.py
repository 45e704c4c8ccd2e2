"""Packed numbers as arrays: bit fields, small floats, and values in groups with a scale."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

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


def grouped(
    shape: tuple[int, int],
    rows: Callable[[slice], np.ndarray],
    *,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
    biases: np.ndarray | None = None,
    group: np.ndarray | None = None,
) -> np.ndarray:
    """float32[out, in] of quantized numbers: (number - zero) * scale + bias.

    `rows(outputs)` returns some rows of the numbers. Scales, zeros and biases are [out, groups]; `group` is the group of
    each input, i32[in], by default consecutive groups of equal size.
    """
    out = np.empty(shape, np.float32)
    for start in range(0, shape[0], _ROWS):
        some = slice(start, min(start + _ROWS, shape[0]))
        count = some.stop - start
        numbers = rows(some).astype(np.float32)
        numbers = numbers.reshape(count, *((scales.shape[1], -1) if group is None else (-1,)))

        def spread(values: np.ndarray, some: slice = some) -> np.ndarray:
            of_rows = values[some].astype(np.float32)
            return of_rows[:, :, None] if group is None else of_rows[:, group]

        if zeros is not None:
            numbers -= spread(zeros)
        numbers *= spread(scales)
        if biases is not None:
            numbers += spread(biases)
        out[some] = numbers.reshape(count, -1)
    return out
