"""Quantized tensors of GGUF files whose blocks the native CPU kernels multiply as they are stored.

Source: the block layouts in ggml-common.h of ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

from fastgen_jax.checkpoint.block_kind import BlockKind

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight


_HALF = np.uint64(4)  # bits
_LOW_HALVES = np.uint64(0x0F0F_0F0F_0F0F_0F0F)


class _Type(NamedTuple):
    kind: BlockKind
    block_bytes: int
    read: Callable[[np.ndarray], BlockWeight]


def block_kind(type_id: int) -> BlockKind | None:
    """How `read_blocks` stores a tensor of this type; None if it cannot read it."""
    return _TYPES[type_id].kind if type_id in _TYPES else None


def read_blocks(rows: np.ndarray, type_id: int) -> BlockWeight:
    """The weight [in, out] of stored rows uint8[out, bytes]; ValueError for a type that is not one of `block_kind`."""
    if type_id not in _TYPES:
        raise ValueError(f"tensors of type {type_id} are not kept in blocks; types that are: {sorted(_TYPES)}")
    found = _TYPES[type_id]
    return found.read(np.array(rows, subok=False).reshape(len(rows), -1, found.block_bytes))


def _halves(block: np.ndarray) -> np.ndarray:
    """[..., 2n] values of bytes [..., n]: all low halves, then all high halves. n is a multiple of 8."""
    words = block.view("<u8")  # eight bytes at a time, of all blocks
    count = words.shape[-1]
    out = np.empty((*words.shape[:-1], 2 * count), "<u8")
    for i in range(count):
        word = np.ascontiguousarray(words[..., i])
        np.bitwise_and(word, _LOW_HALVES, out=out[..., i])
        np.bitwise_and(word >> _HALF, _LOW_HALVES, out=out[..., count + i])
    return out.view(np.uint8)


def _float16(block: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(block[..., start : start + 2].view("<f2")[..., 0])


def _q4_0(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    return BlockWeight(values=_halves(blocks[..., 2:]).reshape(len(blocks), -1), scales=_float16(blocks, 0))


def _q4_1(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    values = _halves(blocks[..., 4:]).reshape(len(blocks), -1)
    return BlockWeight(values=values, scales=_float16(blocks, 0), offsets=_float16(blocks, 2))


def _q8_0(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    return BlockWeight(values=blocks[..., 2:].view(np.int8).reshape(len(blocks), -1), scales=_float16(blocks, 0))


def _mxfp4(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    values = _halves(blocks[..., 1:]).view(ml_dtypes.float4_e2m1fn).reshape(len(blocks), -1)
    return BlockWeight(values=values, scales=blocks[..., 0].view(ml_dtypes.float8_e8m0fnu))


def _q5_0(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    values = _five_bits(blocks, 2).view(np.int8) - np.int8(16)
    return BlockWeight(values=values.reshape(len(blocks), -1), scales=_float16(blocks, 0))


def _q5_1(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    scales, offsets = (_float16(blocks, start).astype(np.float32) for start in (0, 2))
    values = _five_bits(blocks, 4).view(np.int8).reshape(len(blocks), -1)
    return BlockWeight(values=values, scales=scales, offsets=offsets)


def _five_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """The 32 values of blocks of Q5: four bytes hold the fifth bits, and 16 bytes two times four bits each."""
    fifth = np.unpackbits(np.ascontiguousarray(blocks[..., start : start + 4]), axis=-1, bitorder="little")
    return _halves(blocks[..., start + 4 :]) | fifth << 4


def _q4_k(blocks: np.ndarray) -> BlockWeight:
    """Superblocks of 8 blocks of 32: scales and offsets are a float16 times 6 bits, which fill 12 bytes."""
    from pallas_kernels.matmul import BlockWeight

    scales, offsets = _scales_and_offsets(blocks)
    values = _halves(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return BlockWeight(values=values.reshape(len(blocks), -1), scales=scales, offsets=offsets)


def _scales_and_offsets(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of Q4_K and Q5_K, float32[rows, blocks of 32] each."""
    scale, offset = (_float16(blocks, start).astype(np.float32)[..., None] for start in (0, 2))
    low, middle, high = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=-1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=-1)
    return (scale * scales).reshape(len(blocks), -1), (-offset * offsets).reshape(len(blocks), -1)


def _q5_k(blocks: np.ndarray) -> BlockWeight:
    """As Q4_K, with the fifth bits of all blocks in 32 bytes: bit i of each for block i."""
    from pallas_kernels.matmul import BlockWeight

    n = len(blocks)
    scales, offsets = _scales_and_offsets(blocks)
    fifth = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    values = _halves(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(fifth.shape) | fifth << 4
    return BlockWeight(values=values.view(np.int8).reshape(n, -1), scales=scales, offsets=offsets)


def _q6_k(blocks: np.ndarray) -> BlockWeight:
    """Superblocks of 16 blocks of 16: scales are a float16 times 8 bits. Values are in two halves of 128.

    Of a half, 64 bytes hold four bits each of two values 64 apart, and 32 bytes two bits each of four values 32 apart.
    """
    from pallas_kernels.matmul import BlockWeight

    n = len(blocks)
    low = _halves(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64)).reshape(*blocks.shape[:2], 2, 4, 32)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    values = (low | high << 4).view(np.int8) - np.int8(32)
    scales = _float16(blocks, 208).astype(np.float32)[..., None] * blocks[..., 192:208].view(np.int8)
    return BlockWeight(values=values.reshape(n, -1), scales=scales.reshape(n, -1))


def _q2_k(blocks: np.ndarray) -> BlockWeight:
    """Superblocks of 16 blocks of 16: scales and offsets are a float16 times 4 bits, in one byte."""
    from pallas_kernels.matmul import BlockWeight

    n = len(blocks)
    both = blocks[..., :16]
    scale, offset = (_float16(blocks, start).astype(np.float32)[..., None] for start in (80, 82))
    scales, offsets = (scale * (both & 15)).reshape(n, -1), (-offset * (both >> 4)).reshape(n, -1)
    return BlockWeight(values=_quarters(blocks[..., 16:80]).reshape(n, -1), scales=scales, offsets=offsets)


def _q3_k(blocks: np.ndarray) -> BlockWeight:
    """Superblocks of 16 blocks of 16, whose scales are a float16 times 6 bits, in two parts.

    Of a value, counted from 4, two bits are as in Q2_K, and the third is in one of 32 bytes, as in Q5_K.
    """
    from pallas_kernels.matmul import BlockWeight

    n = len(blocks)
    low, high = _halves(blocks[..., 96:104]), blocks[..., None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = (low | high.reshape(low.shape) << 4).view(np.int8) - np.int8(32)
    scales = (_float16(blocks, 108).astype(np.float32)[..., None] * scales).reshape(n, -1)
    third = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    values = _quarters(blocks[..., 32:96]) | third.reshape(*blocks.shape[:2], 256) << 2
    return BlockWeight(values=values.reshape(n, -1), scales=scales, offsets=-4 * scales)


def _quarters(block: np.ndarray) -> np.ndarray:
    """[..., 256] values of two bits of bytes [..., 64]: 32 bytes have four values each, 32 apart."""
    pieces = block.reshape(*block.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return pieces.reshape(*block.shape[:-1], 256)


def _iq4_nl(blocks: np.ndarray) -> BlockWeight:
    from pallas_kernels.matmul import BlockWeight

    return BlockWeight(values=_LEVELS[_halves(blocks[..., 2:])].reshape(len(blocks), -1), scales=_float16(blocks, 0))


def _iq4_xs(blocks: np.ndarray) -> BlockWeight:
    """Superblocks of 8 blocks of 32 as in IQ4_NL, whose scales are a float16 times 6 bits, in two parts."""
    from pallas_kernels.matmul import BlockWeight

    n = len(blocks)
    high = np.ascontiguousarray(blocks[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(high.shape)
    scales = _float16(blocks, 0).astype(np.float32)[..., None] * ((low | high << 4).astype(np.float32) - 32)
    values = _LEVELS[_halves(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))]
    return BlockWeight(values=values.reshape(n, -1), scales=scales.reshape(n, -1))


# The values that the 16 numbers of IQ4_NL and IQ4_XS stand for.
_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)

_TYPES = {
    2: _Type(BlockKind("Q4_0", 4.5, 32, 4, scale_dtype="float16"), 18, _q4_0),
    3: _Type(BlockKind("Q4_1", 5.0, 32, 4, has_offsets=True, scale_dtype="float16"), 20, _q4_1),
    6: _Type(BlockKind("Q5_0", 8.5, 32, scale_dtype="float16"), 22, _q5_0),
    7: _Type(BlockKind("Q5_1", 10.0, 32, has_offsets=True), 24, _q5_1),
    8: _Type(BlockKind("Q8_0", 8.5, 32, scale_dtype="float16"), 34, _q8_0),
    10: _Type(BlockKind("Q2_K", 8.0, 16, 4, has_offsets=True), 84, _q2_k),
    11: _Type(BlockKind("Q3_K", 8.0, 16, 4, has_offsets=True), 110, _q3_k),
    12: _Type(BlockKind("Q4_K", 6.0, 32, 4, has_offsets=True), 144, _q4_k),
    13: _Type(BlockKind("Q5_K", 10.0, 32, has_offsets=True), 176, _q5_k),
    14: _Type(BlockKind("Q6_K", 10.0, 16), 210, _q6_k),
    20: _Type(BlockKind("IQ4_NL", 8.5, 32, scale_dtype="float16"), 18, _iq4_nl),
    23: _Type(BlockKind("IQ4_XS", 9.0, 32), 136, _iq4_xs),
    39: _Type(BlockKind("MXFP4", 4.25, 32, 4, is_float=True, scale_dtype="float8_e8m0fnu"), 17, _mxfp4),
}
