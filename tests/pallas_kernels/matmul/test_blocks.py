"""Weights in blocks: products are those with the matrix that the blocks stand for, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.matmul import BlockWeight, PackedWeight, concatenate, linear, prepare, quantize_int4, swiglu, widen
from pallas_kernels.matmul.blocks import NF4
from tests.pallas_kernels.matmul.random_blocks import FORMATS, random_blocks

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

ROWS = (1, 2, 3, 14, 15, 40)
# [K, N] and the size of a block; 4096 is more than one part of the contraction axis.
SHAPES = [(32, 7, 16), (64, 95, 32), (512, 33, 128), (4096, 40, 64)]


def _x(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((m, k), np.float32)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("k", "n", "size"), SHAPES)
def test_products_are_those_of_the_matrix_that_the_blocks_stand_for(k, n, size, form, dtype):
    blocks = random_blocks(k, n, size, *form)
    packed = prepare(blocks, platform="cpu", dtype=dtype)
    plain = prepare(blocks.dequantize().astype(dtype), platform="cpu")
    assert isinstance(packed, PackedWeight)
    assert packed.shape == blocks.shape == (k, n)
    assert packed.panels.dtype == jnp.uint8
    rounds_weights = dtype == "bfloat16" and not packed.rounds  # a CPU that does not multiply bfloat16
    if rounds_weights:
        plain = prepare(blocks.dequantize(), platform="cpu")
    products = jax.jit(lambda inputs, w: [linear(x, w) for x in inputs])
    inputs = [_x(m, k) for m in ROWS]
    for ours, theirs in zip(products(inputs, packed), products(inputs, plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@needs_native
def test_a_row_with_many_short_panels_is_the_first_of_two_rows():
    w = prepare(random_blocks(32, 16 * 131, 32, "uint4", False, "float16"), platform="cpu", dtype="float32")
    x = jnp.asarray(_x(2, 32))
    np.testing.assert_array_equal(linear(x[:1], w), linear(x, w)[:1])  # a thread takes a run of panels for one row alone


@needs_native
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gated_products_and_single_layers_too(form):
    layers = [random_blocks(64, 2 * 40, 32, *form, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *rows: jnp.stack(rows), *(prepare(each, platform="cpu", gated=True) for each in layers))
    x = jnp.asarray(_x(5, 64))
    for layer, blocks in enumerate(layers):
        plain = prepare(blocks.dequantize(), platform="cpu", gated=True)
        np.testing.assert_array_equal(swiglu(x, stack.at_layer(layer)), swiglu(x, plain))


@needs_native
def test_blocks_take_the_memory_of_their_bits():
    packed = prepare(random_blocks(4096, 64, 32, "uint4", False, "float16"), platform="cpu")
    assert packed.panels.nbytes == 4096 * 64 * 4.5 / 8


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantizing_follows_the_definition(form):
    blocks = random_blocks(64, 3, 32, *form)
    for n, k in ((0, 0), (1, 31), (2, 32), (2, 63)):
        scale, q = np.float64(blocks.scales[n, k // 32]), blocks.values[n, k]
        q = float(NF4[q] if blocks.is_nf4 else q)
        offset = 0 if blocks.offsets is None else np.float64(blocks.offsets[n, k // 32])
        if form[:2] == ("uint4", False):
            offset = -8 * scale
        assert blocks.dequantize()[k, n] == np.float32(scale * q + offset)


def test_int4_has_at_most_half_the_step_of_a_block_as_error():
    w = np.random.default_rng(0).standard_normal((64, 30), np.float32)
    w[:32, 3] = 0
    blocks = quantize_int4(w)
    step = np.abs(blocks.scales.astype(np.float32)).T.repeat(32, axis=0)
    error = np.abs(blocks.dequantize() - w)
    clipped = np.abs(w) > 7.5 * step  # beyond the range of a scale that has a smaller error elsewhere
    assert (error[~clipped] <= step[~clipped] / 2 + 1e-6).all()
    assert np.square(error).mean() < np.square(step).mean() / 11  # a uniform error has a twelfth
    assert (blocks.dequantize()[:32, 3] == 0).all()


@pytest.mark.parametrize(
    ("values", "scales", "offsets", "message"),
    [
        (np.zeros((2, 64), np.int16), np.zeros((2, 2), np.float16), None, "must be uint8"),
        (np.zeros((2, 64), np.uint8), np.zeros((3, 2), np.float16), None, r"must be \[2, K / size\]"),
        (np.zeros((2, 64), np.uint8), np.zeros((2, 8), np.float16), None, "blocks have 8 inputs; supported: 16, 32"),
        (np.zeros((2, 64), np.uint8), np.zeros((2, 2), np.float16), np.zeros((2, 2), np.float32), "unlike the scales"),
        (np.zeros((2, 64), np.uint8), np.zeros((2, 2), np.float32), None, "not supported; supported: uint4 with float16"),
    ],
)
def test_blocks_that_do_not_fit_together_are_refused(values, scales, offsets, message):
    with pytest.raises(ValueError, match=message):
        BlockWeight(values=values, scales=scales, offsets=offsets)


def test_int4_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"blocks of 32 inputs, but the weight has 33 inputs; use quantize='int8'"):
        quantize_int4(np.ones((33, 4), np.float32))
    with pytest.raises(ValueError, match="in blocks already"):
        prepare(quantize_int4(np.ones((32, 4), np.float32)), quantize="int8", platform="cpu")


def test_other_platforms_get_the_matrix():
    blocks = random_blocks(64, 6, 32, "uint4", True, "float16")
    plain = prepare(blocks, platform="tpu", dtype="float32")
    np.testing.assert_array_equal(plain, blocks.dequantize())


@pytest.mark.parametrize(("form", "bits"), [(("int8", False, "float16"), 4), (("float8_e4m3fn", False, "float32"), 8)])
def test_values_that_other_bits_cannot_hold_are_not_widened(form, bits):
    with pytest.raises(ValueError, match=rf"blocks of {form[0]} have no equal in integers of {bits} bits"):
        widen(random_blocks(64, 3, 32, *form), 32, bits)


def test_weights_side_by_side_are_one():
    parts = [random_blocks(64, n, 32, "uint4", True, "float16", seed=n) for n in (3, 5)]
    whole = concatenate(parts)
    np.testing.assert_array_equal(whole.dequantize(), np.concatenate([part.dequantize() for part in parts], axis=1))
