"""The product for Hopper GPUs equals a plain one in the Pallas Mosaic-GPU interpreter; and its limits, tiles and plans."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels import jax_versions
from pallas_kernels.grouped_matmul.gpu import plan_groups
from pallas_kernels.jax_versions import AbstractGpu
from pallas_kernels.matmul import Division, Int8Weight, linear, reads_in_place
from pallas_kernels.matmul.hopper_support import GRANULE, depth_of, fits, modeled, shared_bytes
from tests.pallas_kernels.matmul.random_int4 import random_int4

TOO_OLD = jax_versions.too_old(jax_versions.GPU_KERNELS)


@pytest.mark.skipif(TOO_OLD is not None, reason=f"the GPU kernel {TOO_OLD}")
@pytest.mark.slow
@pytest.mark.parametrize("which", ["quick", *map(str, range(2, 16))])
def test_the_product_in_the_interpreter_is_that_of_plain_matrices(which: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.matmul.gpu_interpreter", which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal: " in done.stdout


@pytest.mark.parametrize("sizes", [(5, 0, 70, 9), (0, 0, 0, 0), (64, 64, 1, 0), (8, 8, 8, 70)])
@pytest.mark.parametrize("rows", [64, 128])
def test_every_row_of_a_group_is_in_one_tile_of_its_matrix(sizes: tuple[int, ...], rows: int) -> None:
    num_rows, first = 150, 12
    plan = plan_groups(jnp.asarray(sizes, jnp.int32), jnp.int32(first), num_rows=num_rows, rows=rows)
    work, count = np.asarray(plan.work[:-1]), int(plan.work[-1, 0])
    source, place = np.asarray(plan.source), np.asarray(plan.place)
    group = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(plan.is_used, np.arange(num_rows) < len(group))
    stored: dict[int, int] = {}  # a row of granules -> its matrix
    for matrix, row, granules in work[:count]:
        assert row % GRANULE == 0
        assert 0 < granules <= rows // GRANULE
        assert row + rows <= len(source)  # a tile is read whole
        for i in range(row, row + GRANULE * granules):
            assert i not in stored
            stored[i] = matrix
    for i, g in enumerate(group):
        assert stored[place[i]] == first + g
        assert source[place[i]] == i


@pytest.mark.parametrize(
    ("shape", "stored", "dtype", "expected"),
    [
        ((32, 4096, 6144), "int8", "bfloat16", True),
        ((32, 896, 1152), "int8", "float16", True),
        ((256, 2880, 5760), "bfloat16", "bfloat16", True),
        ((32, 4096, 6144), "int8", "float32", False),
        ((32, 360, 2880), "bfloat16", "bfloat16", False),
        ((1, 4096, 16032), "int8", "bfloat16", True),  # the vocabulary of Llama 3 on eight devices
        ((1, 4096, 16032), "bfloat16", "bfloat16", False),
        ((32, 4096, 720), "int8", "bfloat16", False),
        ((32, 4096, 64), "int8", "bfloat16", False),
        ((32, 4096, 6144), "float32", "bfloat16", False),
        ((32, 2880, 5760), "float8_e4m3fn", "bfloat16", True),
        ((1, 4096, 16032), "float8_e4m3fn", "bfloat16", True),
        ((32, 360, 2880), "float8_e4m3fn", "bfloat16", False),
        ((32, 2880, 5760), "uint8", "bfloat16", True),  # int4
        ((1, 64, 160), "uint8", "float16", True),
        ((32, 96, 256), "uint8", "bfloat16", False),
        ((32, 4096, 6144), "uint8", "float32", False),
    ],
)
def test_weights_of_whole_tiles_are_supported(shape: tuple[int, ...], stored: str, dtype: str, expected: bool) -> None:
    assert fits(shape, jnp.dtype(stored), jnp.dtype(dtype)) == expected


@pytest.mark.parametrize(
    ("inputs", "size", "expected"),
    [
        (64, 32, True),
        (896, 64, True),
        (896, 128, True),
        (896, 896, True),
        (192, 96, False),
        (448, 128, False),
        (64, 16, False),
    ],
)
def test_a_step_of_int4_has_one_scale_or_one_for_each_half(inputs: int, size: int, expected: bool) -> None:
    assert fits((2, inputs, 256), jnp.dtype("uint8"), jnp.dtype("bfloat16"), size=size) == expected


@pytest.mark.parametrize("shape", [(1, 4096, 6144), (1, 14336, 4096), (1, 896, 128256), (1, 64, 160)])
@pytest.mark.parametrize("stored", ["int8", "bfloat16", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("rows", [64, 128])
def test_modeled_tiles_fit_and_every_split_has_work(shape: tuple[int, ...], stored: str, rows: int) -> None:
    tiles = modeled(rows, 1, shape, jnp.dtype(stored), rows=rows)
    assert tiles.stages >= 2
    assert shared_bytes(tiles, jnp.dtype(stored)) <= 227 * 1024 - 1024
    steps = shape[1] // depth_of(jnp.dtype(stored), shape[1])
    assert (tiles.splits - 1) * -(-steps // tiles.splits) < steps


def test_a_product_with_few_columns_is_split_so_that_all_multiprocessors_read() -> None:
    tiles = modeled(64, 1, (1, 4096, 4096), jnp.dtype("int8"), rows=64, blocks=132)
    assert tiles.splits * 4096 // (2 * tiles.columns) > 0.75 * 132
    assert modeled(64, 8, (8, 4096, 28672), jnp.dtype("bfloat16"), rows=64, blocks=132).splits == 1


def test_a_layer_of_a_stack_is_read_in_place_on_a_hopper() -> None:
    stack = Int8Weight(values=jnp.ones((3, 64, 128), jnp.int8), scales=jnp.ones((3, 128), jnp.float32))
    found = {}
    for capability in ("7.5", "9.0", "10.0"):
        device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            found[capability] = reads_in_place(stack, jnp.bfloat16)
    is_new = jax_versions.too_old(jax_versions.HOPPER_PRODUCT) is None
    assert found == {"7.5": False, "9.0": is_new, "10.0": False}
    assert not reads_in_place(stack, jnp.bfloat16)  # on this CPU
    assert not reads_in_place(stack.values, jnp.bfloat16)


@pytest.mark.parametrize(
    ("inputs", "size", "expected"), [(512, 128, True), (256, 128, False), (256, 64, True), (64, 32, False)]
)
def test_each_device_needs_whole_steps_and_whole_blocks(inputs: int, size: int, expected: bool) -> None:
    stack = random_int4(3, inputs, 256, size=size, scales="float16", offsets=False, seed=0)
    device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability="9.0")
    mesh = Mesh(np.array(jax.devices()[:1] * 4), ("tensor",))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        found = [
            reads_in_place(stack, jnp.bfloat16, Division(mesh=mesh, axis="tensor", of_inputs=of_inputs))
            for of_inputs in (True, False)
        ]
    is_new = jax_versions.too_old(jax_versions.HOPPER_PRODUCT) is None
    assert found == [is_new and expected, False]  # 64 outputs on a device are too few


def test_a_selected_layer_is_multiplied_on_every_platform() -> None:
    values = np.random.default_rng(0).integers(-127, 128, (3, 64, 128)).astype(np.int8)
    stack = Int8Weight(values=jnp.asarray(values), scales=jnp.full((3, 128), 0.5, jnp.float32))
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert stack.at_layer(1).shape == (64, 128)
    y = linear(x, stack.at_layer(1), out_dtype=jnp.float32)
    np.testing.assert_allclose(y[0], 0.5 * values[1].sum(0), rtol=1e-6)
