"""Tensors of GGUF files in blocks: the values are those of the gguf library, and engines compute with them as stored."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fastgen_jax.checkpoint import gguf_blocks
from fastgen_jax.checkpoint.block_kind import BlockKind, common_kind
from pallas_kernels.matmul import concatenate, widen

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "MXFP4": 39}
# The bytes of a block that hold float16 numbers, if not (0, 4).
SCALES = {
    "Q4_0": (0, 2),
    "Q5_0": (0, 2),
    "Q8_0": (0, 2),
    "Q6_K": (208, 210),
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
    stored = blocks.scales.nbytes + (0 if blocks.offsets is None else blocks.offsets.nbytes)
    assert kind.bits == blocks.format.bits + 8 * stored / blocks.values.size


def test_matrices_of_different_kinds_take_a_common_one_with_the_same_values():
    kinds = [gguf_blocks.block_kind(KINDS[name]) for name in ("Q4_K", "Q6_K", "Q4_0")]
    common = common_kind(kinds)
    assert common == BlockKind("Q4_0 and Q4_K and Q6_K as 8 bits", 12.0, 16, is_common=True)
    parts = [gguf_blocks.read_blocks(_rows(name), KINDS[name]) for name in ("Q4_K", "Q6_K", "Q4_0")]
    whole = concatenate([widen(part, common.size) for part in parts])
    np.testing.assert_array_equal(whole.dequantize(), np.concatenate([part.dequantize() for part in parts], axis=1))
    assert common_kind([kinds[0], None]) is None
    assert common_kind(kinds[:1]) == kinds[0]


def test_other_types_are_not_kept():
    assert gguf_blocks.block_kind(gguf.GGMLQuantizationType.Q3_K) is None
    with pytest.raises(ValueError, match=r"type 11 are not kept.*\[2, 3, 6, 7, 8, 12, 13, 14, 39\]"):
        gguf_blocks.read_blocks(np.zeros((2, 110), np.uint8), 11)
