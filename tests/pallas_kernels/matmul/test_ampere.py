"""The product for Ampere GPUs equals a plain one in the Pallas Mosaic-GPU interpreter; its registers, limits and tiles."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import jax_versions
from pallas_kernels.jax_versions import AbstractGpu
from pallas_kernels.matmul import Int8Weight, reads_in_place
from pallas_kernels.matmul.ampere_support import (
    COLUMNS,
    DEPTH,
    FUSED_SPLITS,
    LARGEST_ROWS,
    LEAST_SHARED_BYTES,
    SHARED_BYTES,
    blocks_together,
    fits,
    modeled,
    stage_bytes,
    tile_rows,
)

TOO_OLD = jax_versions.too_old(jax_versions.AMPERE_PRODUCT)
NEEDS_KERNELS = pytest.mark.skipif(
    jax_versions.too_old(jax_versions.GPU_KERNELS) is not None, reason="the interpreter is too old"
)
NEEDS_LAYOUTS = pytest.mark.skipif(
    jax.__version_info__ < jax_versions.AMPERE_KERNEL, reason="this jax has no layouts for mma"
)
CASES = range(16, 28)  # of `gpu_interpreter.ALL`


@NEEDS_KERNELS
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_product_in_the_interpreter_is_that_of_plain_matrices(case: int) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.matmul.gpu_interpreter", str(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal: " in done.stdout
    assert "generation='ampere'" in done.stdout


def elements(layout: Any, shape: tuple[int, int]) -> np.ndarray:
    """Which element of an array is where: [threads, registers, numbers of a register]."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape)
    for tile in layout.tiling.tiles:  # the last axes become (how many tiles, inside of one)
        outer = numbers.ndim - len(tile)
        axes = [n for size, inner in zip(numbers.shape[outer:], tile, strict=True) for n in (size // inner, inner)]
        numbers = numbers.reshape(*numbers.shape[:outer], *axes)
        order = [outer + 2 * i for i in range(len(tile))] + [outer + 2 * i + 1 for i in range(len(tile))]
        numbers = numbers.transpose(*range(outer), *order)

    def threads(dims: tuple[Any, ...]) -> tuple[list[int], int]:
        """The axes of warps or lanes, and by how many of them each element is held."""
        copies = [dim.times for dim in dims if not isinstance(dim, int)]
        return [dim % numbers.ndim for dim in dims if isinstance(dim, int)], int(np.prod(copies, dtype=int))

    (warps, warp_copies), (lanes, lane_copies) = threads(layout.warp_dims), threads(layout.lane_dims)
    assert lane_copies == 1
    vector = layout.vector_dim % numbers.ndim
    registers = [axis for axis in range(numbers.ndim) if axis not in (*warps, *lanes, vector)]
    length = numbers.shape[vector]
    numbers = numbers.transpose(*warps, *lanes, *registers, vector).reshape(4 // warp_copies, 32, -1, length)
    return np.repeat(numbers, warp_copies, axis=0).reshape(128, -1, length)


@NEEDS_LAYOUTS
def test_what_a_thread_multiplies_and_stores_belongs_to_the_same_columns() -> None:
    from pallas_kernels.matmul import ampere_operands as operands

    rows = 64
    words = elements(operands.words().to_mgpu(), (16, COLUMNS))
    right = elements(operands.right(jnp.bfloat16).to_mgpu(), (16, COLUMNS))
    sums = elements(operands.sums(jnp.bfloat16).to_mgpu(), (rows, COLUMNS))
    results = elements(operands.results(of_words=True).to_mgpu(), (rows, COLUMNS))
    column_of = np.full(COLUMNS, -1)  # column of the product -> that of the tile
    for thread in range(128):
        # Register (group, half) of an operand has a byte of each of two words.
        for half, (one, other) in enumerate(operands.pairs_of_words(np.arange(4))):
            for group in range(4):
                for i, word in enumerate((one, other)):
                    stored, multiplied = words[thread, word, group], right[thread, 2 * group + half, i]
                    assert stored // COLUMNS == multiplied // COLUMNS  # the same input
                    assert column_of[multiplied % COLUMNS] in (-1, stored % COLUMNS)
                    column_of[multiplied % COLUMNS] = stored % COLUMNS
    np.testing.assert_array_equal(np.sort(column_of), np.arange(COLUMNS))
    for thread in range(128):
        for granule, row in enumerate(operands.by_granule(np.arange(sums.shape[1]))):
            order = operands.order_of_columns(list(row), lambda register, i, thread=thread: sums[thread, register, i])
            found = [number // COLUMNS * COLUMNS + column_of[number % COLUMNS] for number in order]
            np.testing.assert_array_equal(found, results[thread, granule])


@NEEDS_LAYOUTS
def test_sums_by_granule_keep_their_columns() -> None:
    from pallas_kernels.matmul import ampere_operands as operands

    sums = elements(operands.sums(jnp.float16).to_mgpu(), (32, COLUMNS))
    results = elements(operands.results(of_words=False).to_mgpu(), (32, COLUMNS))
    found = sums[:, operands.by_granule(np.arange(sums.shape[1])).reshape(-1)]
    np.testing.assert_array_equal(found, results)


@NEEDS_LAYOUTS
@pytest.mark.parametrize("of_words", [True, False])
def test_the_columns_of_a_thread_are_evenly_spaced(of_words: bool) -> None:
    from pallas_kernels.matmul import ampere_operands as operands

    results = elements(operands.results(of_words=of_words).to_mgpu(), (8, COLUMNS))
    width = COLUMNS // results.shape[1]
    for register in range(results.shape[1]):
        np.testing.assert_array_equal(results[:, register], results[:, 0] + register * width)


def test_bit_operations_convert_every_byte() -> None:
    numbers = np.arange(-128, 128).astype(np.int8)
    bits = numbers.view(np.uint8).astype(np.uint32)
    with_exponent = (0x4300 | bits) << 16  # bfloat16 is the upper half of float32
    lower, sign = ((with_exponent & np.uint32(mask << 16)).view(np.float32) for mask in (0xFF7F, 0xFF80))
    np.testing.assert_array_equal(lower - sign, numbers)
    inverted = (0x6400 | (bits ^ 0x80)).astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(inverted - np.float16(1024 + 128), numbers)


@pytest.mark.parametrize(
    ("shape", "stored", "dtype", "expected"),
    [
        ((32, 4096, 6144), "int8", "bfloat16", True),
        ((32, 896, 1152), "int8", "float16", True),
        ((32, 896, 144), "int8", "float16", True),
        ((32, 896, 136), "int8", "float16", False),
        ((32, 896, 64), "int8", "float16", False),
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
@pytest.mark.parametrize("capability", ["8.0", "8.9"])
def test_modeled_tiles_fit_and_every_split_has_work(
    shape: tuple[int, ...], stored: str, num_rows: int, capability: str
) -> None:
    rows = tile_rows(num_rows)
    device = AbstractGpu(device_kind="a GPU", num_cores=100, compute_capability=capability)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        tiles = modeled(-(-num_rows // rows), shape, jnp.dtype(stored), rows=rows)
    assert tiles.stages >= 2
    shared = SHARED_BYTES.get(capability, LEAST_SHARED_BYTES)
    taken = tiles.stages * stage_bytes(rows, jnp.dtype(stored))
    assert taken <= min(shared, 163 * 1024) - 1024
    blocks = -(-num_rows // rows) * -(-shape[-1] // COLUMNS) * tiles.splits
    if tiles.stages > 2 and blocks > blocks_together(rows) * 100:
        assert blocks_together(rows) * (taken + 1024) <= shared
    steps = shape[1] // DEPTH
    assert (tiles.splits - 1) * -(-steps // tiles.splits) < steps


def test_a_product_with_few_columns_is_split_so_that_all_multiprocessors_read() -> None:
    device = AbstractGpu(device_kind="an A100", num_cores=108, compute_capability="8.0")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        tiles = modeled(1, (1, 4096, 4096), jnp.dtype("int8"), rows=64)
        few = modeled(1, (1, 4096, 768), jnp.dtype("int8"), rows=64)
        many = modeled(16, (1, 4096, 28672), jnp.dtype("int8"), rows=LARGEST_ROWS)
    assert tiles.splits * 4096 // COLUMNS > 0.75 * 108
    assert tiles.splits <= FUSED_SPLITS
    assert few.splits > FUSED_SPLITS
    assert many.splits == 1


def test_a_layer_of_a_stack_is_read_in_place_on_an_ampere() -> None:
    stack = Int8Weight(values=jnp.ones((3, 64, 128), jnp.int8), scales=jnp.ones((3, 128), jnp.float32))
    for capability, expected in (("7.5", False), ("8.0", TOO_OLD is None), ("8.9", TOO_OLD is None)):
        device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            assert reads_in_place(stack, jnp.bfloat16) == expected
