"""Tensors of GGUF files in blocks: the values are those of the gguf library, and engines compute with them as stored."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fastgen_jax.checkpoint import gguf_blocks

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12}


def _rows(name: str, n: int = 5, k: int = 512) -> np.ndarray:
    """Stored rows uint8[n, bytes] with random values and scales."""
    generator = np.random.default_rng(KINDS[name])
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (n, k // block, size), np.uint8)
    scales = generator.uniform(-0.01, 0.01, (n, k // block, 2)).astype(np.float16).view(np.uint8)
    count = 2 if name in ("Q4_0", "Q8_0") else 4  # bytes of scales at the start of a block
    blocks[..., :count] = scales[..., :count]
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


def test_other_types_are_not_kept():
    assert gguf_blocks.block_kind(gguf.GGMLQuantizationType.Q6_K) is None
    with pytest.raises(ValueError, match=r"type 14 are not kept.*\[2, 3, 8, 12\]"):
        gguf_blocks.read_blocks(np.zeros((2, 210), np.uint8), 14)
