"""Tensors of GGUF files in blocks: the values are those of the gguf library, and engines compute with them as stored."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fastgen_jax.checkpoint import gguf_blocks
from fastgen_jax.checkpoint.block_kind import BlockKind, common_kind, side_by_side

KINDS = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "MXFP4": 39,
}
# The bytes of a block that hold float16 numbers, if not (0, 4).
SCALES = {
    "Q4_0": (0, 2),
    "Q5_0": (0, 2),
    "Q8_0": (0, 2),
    "Q6_K": (208, 210),
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "IQ4_NL": (0, 2),
    "IQ4_XS": (0, 2),
}


def _rows(name: str, n: int = 5, k: int = 512) -> np.ndarray:
    """Stored rows uint8[n, bytes] with random values and scales."""
    generator = np.random.default_rng(KINDS[name])
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (n, k // block, size), np.uint8)
    if name == "MXFP4":
        blocks[..., 0] %= 253  # an exponent; larger ones overflow
        return blocks.reshape(n, -1)
    start, end = SCALES.get(name, (0, 4))
    scales = generator.uniform(-0.01, 0.01, (n, k // block, (end - start) // 2)).astype(np.float16)
    blocks[..., start:end] = scales.view(np.uint8)
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_stand_for_the_values_of_the_gguf_library(name):
    rows = _rows(name)
    blocks = gguf_blocks.read_blocks(rows, KINDS[name])
    np.testing.assert_array_equal(blocks.dequantize().T, gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]))
    kind = gguf_blocks.block_kind(KINDS[name])
    assert kind is not None
    assert (kind.bits, kind.size) == (blocks.format.bits_with_scales, blocks.size)
    assert (kind.has_offsets, kind.scale_dtype) == (blocks.offsets is not None, blocks.scales.dtype.name)
    assert kind.value_bits == blocks.format.bits


@pytest.mark.parametrize(("names", "bits"), [(("Q4_K", "Q6_K", "Q4_0"), 8), (("Q2_K", "Q3_K", "Q4_K", "Q4_0"), 4)])
def test_matrices_of_different_kinds_take_a_common_one_with_the_same_values(names, bits):
    kinds = [gguf_blocks.block_kind(KINDS[name]) for name in names]
    common = common_kind(kinds)
    assert common == BlockKind(
        f"{' and '.join(sorted(names))} as {bits} bits", bits + 4, 16, bits, is_common=True, has_offsets=True
    )
    parts = [gguf_blocks.read_blocks(_rows(name), KINDS[name]) for name in names]
    whole = side_by_side(parts, common)
    assert whole.format.bits_with_scales == common.bits
    np.testing.assert_array_equal(whole.dequantize(), np.concatenate([part.dequantize() for part in parts], axis=1))
    assert common_kind([kinds[0], None]) is None
    assert common_kind(kinds[:1]) == kinds[0]
    assert common_kind([kinds[0], gguf_blocks.block_kind(KINDS["MXFP4"])]) is None


def test_other_types_are_not_kept():
    assert gguf_blocks.block_kind(gguf.GGMLQuantizationType.IQ1_S) is None
    with pytest.raises(ValueError, match=r"type 19 are not kept.*\[2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 39\]"):
        gguf_blocks.read_blocks(np.zeros((2, 50), np.uint8), 19)
