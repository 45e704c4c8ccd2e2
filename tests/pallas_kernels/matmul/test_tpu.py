"""The product of the TPU kernel with weights of 4 bits, in the Pallas TPU interpreter, and how it divides its work.

See `tests.pallas_kernels.grouped_matmul.test_tpu` for the modes of copies, and for other weights.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.matmul import BlockWeight, Division, Int4Weight, linear, pack_int4, reads_in_place, tpu, tpu_support
from pallas_kernels.tpu_target import DEVICES, MIB
from tests.pallas_kernels.abstract_tpu import lowering_for_tpu
from tests.pallas_kernels.matmul.random_blocks import random_blocks
from tests.pallas_kernels.races import races_found

SYMMETRIC, WITH_OFFSETS = ("uint4", False, "float16"), ("uint4", True, "float16")


def _stack(*weights: BlockWeight) -> Int4Weight:
    packed = [pack_int4(weight, scale_dtype=np.float32) for weight in weights]
    return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *packed)


def _x(rows: int, depth: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, depth), np.float32), dtype)


@pytest.mark.parametrize(
    ("size", "form", "mode", "depth"),
    [
        (32, SYMMETRIC, "eager", 576),  # two steps of 256 inputs, and 64 that are left
        (64, WITH_OFFSETS, "on_wait", 64),  # less than a step
        pytest.param(64, WITH_OFFSETS, "eager", 1088, marks=pytest.mark.slow),
        pytest.param(128, SYMMETRIC, "on_wait", 2176, marks=pytest.mark.slow),
        pytest.param(256, WITH_OFFSETS, "on_wait", 2304, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fast_compilation")
def test_a_layer_of_a_stack_is_multiplied_where_it_is(size, form, mode, depth):
    w = _stack(*(random_blocks(depth, 256, size, *form, seed=seed) for seed in range(2))).at_layer(1)
    x = _x(24, depth)
    modeled = tpu.tiles_of(w, num_rows=24, num_groups=1, itemsize=4)
    tiles = dataclasses.replace(modeled, rows=16, columns=128, step=min(depth, max(256, 8 * size)))
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    got = jax.jit(partial(tpu.multiply, tiles=tiles, interpret=interpret))(x, w)
    # Sums of as many products of size one, in another order.
    np.testing.assert_allclose(got, linear(x, w), atol=1e-4)
    if mode == "eager":
        assert races_found() is False


@pytest.mark.parametrize(
    ("size", "form"),
    [(32, WITH_OFFSETS), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(32, SYMMETRIC), (128, WITH_OFFSETS)])],
    ids=str,
)
@pytest.mark.usefixtures("fast_compilation")
def test_a_narrow_product_differs_by_roundings_to_bfloat16(size, form):
    blocks = random_blocks(256, 128, size, *form)
    if blocks.offsets is not None:
        blocks.scales[:2] = 0  # all numbers of a group are its offset
        blocks.offsets[1] = 0  # or zero
    w = _stack(blocks).at_layer(0)
    # The rows of the identity are the weights themselves.
    got = jax.jit(partial(tpu.multiply, narrow=True, interpret=pltpu.InterpretParams()))(jnp.eye(256, dtype=jnp.bfloat16), w)
    want, offsets = blocks.dequantize(), w.offsets
    most = 0.0 if offsets is None else np.repeat(np.abs(offsets[0]), size, axis=0)
    # Of the scale, of the sum of number and offset, and of the product, 2^-8 each; and of the offset in scales.
    assert np.all(np.abs(got - want) <= 2**-8 * (3.1 * np.abs(want) + 1.1 * most))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "form", "mode"), [(32, SYMMETRIC, "eager"), (64, WITH_OFFSETS, "on_wait")], ids=str)
@pytest.mark.usefixtures("fast_compilation")
def test_experts_are_multiplied_where_they_are(size, form, mode):
    w = _stack(*(random_blocks(320, 128, size, *form, seed=seed) for seed in range(12)))
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    run = jax.jit(partial(grouped_matmul_tpu, tile_rows=16, interpret=interpret))
    x, reference = _x(40, 320), jax.jit(grouped_matmul_reference)
    for sizes in ([3, 0, 20, 1], [0, 0, 0, 0], [10, 6, 16, 8]):
        group_sizes, first_group = jnp.asarray(sizes, jnp.int32), jnp.int32(8)  # the last of three layers
        garbage = jnp.where(jnp.arange(40)[:, None] < sum(sizes), x, jnp.nan)  # rows of no group
        got, want = run(garbage, w, group_sizes, first_group), reference(x, w, group_sizes, first_group)
        np.testing.assert_allclose(got, want, atol=1e-4)
    if mode == "eager":
        assert races_found() is False


def test_experts_in_other_forms_are_refused():
    w = _stack(random_blocks(64, 96, 32, *SYMMETRIC))
    with pytest.raises(ValueError, match=r"F of 128, .* but w is \[1, 64, 96\] and 32 share one of float32; pass .*'tiles'"):
        grouped_matmul(_x(3, 64), w, jnp.asarray([3]), implementation="tpu")


def test_whole_tiles_of_int4_are_read_in_place_on_a_tpu(monkeypatch):
    monkeypatch.setattr(tpu_support, "too_old", lambda version: None)  # as with the jax that has the kernel
    mesh = Mesh(np.array(jax.devices()[:1] * 2), ("tensor",))
    division = Division(mesh=mesh, axis="tensor", of_inputs=True)

    def weight(depth: int, columns: int, kind: str = "float32") -> Int4Weight:
        packed = pack_int4(random_blocks(depth, columns, 32, *SYMMETRIC), scale_dtype=kind)
        return jax.tree.map(lambda part: jnp.asarray(part[None]), packed)

    assert not reads_in_place(weight(64, 128), jnp.bfloat16)
    with lowering_for_tpu():
        assert reads_in_place(weight(64, 128), jnp.bfloat16)
        assert reads_in_place(weight(128, 128), jnp.bfloat16, division)
        assert not reads_in_place(weight(64, 128), jnp.bfloat16, division)  # 32 inputs of a device are half of a block
        assert not reads_in_place(weight(64, 96), jnp.bfloat16)
        assert not reads_in_place(weight(64, 128, "float16"), jnp.bfloat16)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize(
    "shape", [(4096, 28672), (14336, 4096), (28672, 8192), (18944, 3584), (2880, 2880), (64, 128)], ids=str
)
def test_tiles_fit_and_steps_begin_with_whole_rows_of_scales(shape, size, kind):
    depth = shape[0]
    if depth % size:
        pytest.skip("no whole groups")
    device = DEVICES[kind]
    for num_rows in (1, 64, 512, 2048):
        tiles = tpu_support.modeled_int4((1, *shape), size, 2, num_rows=num_rows, num_groups=1, device=device)
        assert tiles.rows % 16 == 0
        assert tiles.columns % 128 == 0
        assert tiles.step == depth or (tiles.step % 256 == 0 and tiles.step % (8 * size) == 0)
        weights = tiles.columns * (depth // 2 + math.ceil(depth / size) * 4 * 2)  # with offsets
        memory = 2 * (tiles.rows * depth * 2 + weights + tiles.rows * tiles.columns * 4)
        memory += tiles.columns * (tiles.rows * 4 + 2 * depth // size * 4)
        assert memory <= device.vmem_limit - MIB
