"""The product for Ampere GPUs equals a plain one in the Pallas interpreter; and its limits and tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import jax_versions
from pallas_kernels.grouped_matmul.gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.jax_versions import AbstractGpu
from pallas_kernels.matmul import Int8Weight, ampere, quantize_int8, reads_in_place
from pallas_kernels.matmul.ampere_support import SHARED_BYTES, Tiles, fits, modeled, stage_bytes, tile_rows
from tests.pallas_kernels.matmul.random_int4 import random_int4

TOO_OLD = jax_versions.too_old(jax_versions.AMPERE_PRODUCT)
needs_triton = pytest.mark.skipif(TOO_OLD is not None, reason=f"the GPU kernel {TOO_OLD}")
TILES = Tiles(rows=16, columns=32, splits=3, stages=2, warps=4)
# Both sum in float32, in different orders.
TOLERANCE = {"atol": 2e-4, "rtol": 1e-5}


def _int8(*shape: int) -> Int8Weight:
    values, scales = quantize_int8(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return Int8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))


@needs_triton
@pytest.mark.parametrize("num_rows", [5, 16, 40])
def test_a_layer_of_a_stack_is_multiplied_in_the_interpreter(num_rows: int) -> None:
    stack = _int8(3, 256, 48)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(num_rows, 256)), jnp.bfloat16)
    y = ampere.multiply(x, stack.at_layer(1), tiles=TILES, interpret=True)
    expected = x.astype(jnp.float32) @ (stack.values[1].astype(jnp.float32) * stack.scales[1][None, :])
    np.testing.assert_allclose(y, expected, **TOLERANCE)


@needs_triton
@pytest.mark.parametrize("stored", ["int8", "bfloat16"])
@pytest.mark.parametrize("sizes", [(5, 0, 21, 9), (0, 0, 0, 0), (1, 1, 30, 8)])
def test_groups_are_multiplied_in_the_interpreter(stored: str, sizes: tuple[int, ...]) -> None:
    w = _int8(12, 64, 80)
    weights = w if stored == "int8" else (w.values.astype(jnp.float32) * w.scales[:, None, :]).astype(stored)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 64)), jnp.bfloat16)
    arguments = (x, weights, jnp.asarray(sizes, jnp.int32), jnp.int32(4))
    tiles = Tiles(rows=16, columns=32, splits=1, stages=2, warps=4)
    result = grouped_matmul_gpu(*arguments, tiles=tiles, interpret=True)
    np.testing.assert_allclose(result, grouped_matmul_reference(*arguments), **TOLERANCE)


INT4_FORMS = [(32, "float16", False), (64, "float32", True), (128, "float16", True)]


@needs_triton
@pytest.mark.parametrize(("size", "scales", "offsets"), INT4_FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int4_is_multiplied_in_the_interpreter(size: int, scales: str, offsets: bool, dtype: str) -> None:
    stack = random_int4(3, 384, 48, size=size, scales=scales, offsets=offsets, seed=0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(21, 384)), dtype)
    y = ampere.multiply(x, stack.at_layer(1), tiles=TILES, interpret=True)
    expected = x.astype(jnp.float32) @ stack.dequantize()[1].astype(dtype).astype(jnp.float32)
    np.testing.assert_allclose(y, expected, **TOLERANCE)


@needs_triton
@pytest.mark.parametrize(("size", "scales", "offsets"), INT4_FORMS)
def test_groups_of_int4_are_multiplied_in_the_interpreter(size: int, scales: str, offsets: bool) -> None:
    w = random_int4(12, 128, 80, size=size, scales=scales, offsets=offsets, seed=0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 128)), jnp.bfloat16)
    groups = jnp.asarray((5, 0, 21, 9), jnp.int32), jnp.int32(4)
    tiles = Tiles(rows=16, columns=32, splits=1, stages=2, warps=4)
    result = grouped_matmul_gpu(x, w, *groups, tiles=tiles, interpret=True)
    expected = grouped_matmul_reference(x, w.dequantize().astype(x.dtype), *groups)
    np.testing.assert_allclose(result, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "stored", "dtype", "expected"),
    [
        ((32, 4096, 6144), "int8", "bfloat16", True),
        ((32, 896, 1152), "int8", "float16", True),
        ((256, 2880, 5760), "bfloat16", "bfloat16", True),
        ((32, 4096, 6144), "int8", "float32", False),
        ((32, 360, 2880), "bfloat16", "bfloat16", False),
        ((1, 4096, 151_937), "int8", "bfloat16", False),
        ((32, 4096, 6144), "float8_e4m3fn", "bfloat16", False),
        ((32, 2880, 5760), "uint8", "bfloat16", True),
        ((32, 96, 5760), "uint8", "bfloat16", False),
    ],
)
def test_weights_with_whole_steps_are_supported(shape: tuple[int, ...], stored: str, dtype: str, expected: bool) -> None:
    assert fits(shape, jnp.dtype(stored), jnp.dtype(dtype)) == expected


@pytest.mark.parametrize("shape", [(1, 4096, 6144), (1, 14336, 4096), (1, 896, 128256), (1, 64, 160)])
@pytest.mark.parametrize("stored", ["int8", "bfloat16", "uint8"])
@pytest.mark.parametrize("num_rows", [1, 64, 512])
def test_modeled_tiles_fit_and_every_split_has_work(shape: tuple[int, ...], stored: str, num_rows: int) -> None:
    rows = tile_rows(num_rows)
    tiles = modeled(-(-num_rows // rows), shape, jnp.dtype(stored), rows=rows)
    assert tiles.stages >= 2
    assert tiles.stages * stage_bytes(rows, tiles.columns, jnp.dtype(stored)) <= SHARED_BYTES
    steps = shape[1] // tiles.depth
    assert (tiles.splits - 1) * -(-steps // tiles.splits) < steps


def test_a_layer_of_a_stack_is_read_in_place_on_an_ampere() -> None:
    stack = Int8Weight(values=jnp.ones((3, 64, 128), jnp.int8), scales=jnp.ones((3, 128), jnp.float32))
    for capability, expected in (("7.5", False), ("8.0", TOO_OLD is None), ("8.9", TOO_OLD is None)):
        device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            assert reads_in_place(stack, jnp.bfloat16) == expected
