"""Experts in blocks: products are those with the matrices that the blocks stand for, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.grouped_matmul import BlockGroups, PackedGroups, grouped_matmul, grouped_swiglu, prepare
from pallas_kernels.matmul import BlockWeight, quantize_int4
from tests.pallas_kernels.matmul.random_blocks import FORMATS, random_blocks

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

GROUPS = 4
# Groups of one to four rows, of a tile that is unpacked once, of several tiles, and without rows; then rows of no group.
SIZES = jnp.asarray([3, 0, 9, 31], jnp.int32)
ROWS = 45


def _groups(k: int, n: int, size: int, *form, seed: int = 0) -> BlockGroups:
    weights = [random_blocks(k, n, size, *form, seed=seed + group) for group in range(GROUPS)]
    return BlockGroups(shape=(GROUPS, k, n), read=lambda group: weights[group])


def _matrices(groups: BlockGroups) -> np.ndarray:
    return np.stack([groups.read(group).dequantize() for group in range(GROUPS)])


def _x(k: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, k), np.float32))


@needs_native
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("k", "n", "size", "dtype"), [(96, 70, 32, "float32"), (2304, 33, 256, "bfloat16")])
def test_products_are_those_of_the_matrices_that_the_blocks_stand_for(k, n, size, dtype, form):
    groups = _groups(k, n, size, *form)
    packed = prepare(groups, platform="cpu", dtype=dtype)
    assert isinstance(packed, PackedGroups)
    assert packed.shape == groups.shape
    assert packed.panels.dtype == jnp.uint8
    # A CPU that does not multiply bfloat16 does not round the weights either.
    plain = prepare(_matrices(groups).astype(dtype if packed.rounds else "float32"), platform="cpu")
    got, want = (np.asarray(grouped_matmul(_x(k), w, SIZES)) for w in (packed, plain))
    np.testing.assert_array_equal(got, want)
    assert got[:43].any(axis=1).all()
    assert not got[43:].any()


@needs_native
@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[6]], ids=str)
def test_gated_products_and_single_layers_too(form):
    layers = [_groups(64, 2 * 40, 32, *form, seed=10 * layer) for layer in range(2)]
    stack = jax.tree.map(lambda *rows: jnp.stack(rows), *(prepare(each, platform="cpu", gated=True) for each in layers))
    for layer, groups in enumerate(layers):
        plain = prepare(_matrices(groups), platform="cpu", gated=True)
        got = grouped_swiglu(_x(64), stack.at_layer(layer), SIZES[:3], first_group=1)
        np.testing.assert_array_equal(got, grouped_swiglu(_x(64), plain, SIZES[:3], first_group=1))


@needs_native
@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[5]], ids=str)
def test_the_result_of_a_row_does_not_depend_on_other_rows(form):
    x, w = np.asarray(_x(2304)), prepare(_groups(2304, 40, 256, *form), platform="cpu")
    run = jax.jit(grouped_matmul)
    together = np.asarray(run(x, w, np.asarray([0, ROWS, 0, 0], np.int32)))
    for alone in (1, 4, 5, 14, 15):  # rows that are read in place, and unpacked for
        padded = np.concatenate([x[ROWS - alone :], np.full((ROWS - alone, 2304), 7.0, np.float32)])
        for sizes in ([0, alone, 0, 0], [0, alone, 9, 0], [0, alone + 9, 0, 0]):
            got = np.asarray(run(padded, w, np.asarray(sizes, np.int32)))
            np.testing.assert_array_equal(got[:alone], together[ROWS - alone :])


@needs_native
def test_int4_is_that_of_each_matrix_and_takes_the_memory_of_its_bits():
    w = np.random.default_rng(0).standard_normal((GROUPS, 64, 96), np.float32)
    packed = prepare(w, quantize="int4", platform="cpu")
    assert isinstance(packed, PackedGroups)
    assert packed.panels.nbytes == w.size * 4.5 / 8
    plain = prepare(np.stack([quantize_int4(each).dequantize() for each in w]), platform="cpu")
    np.testing.assert_array_equal(grouped_matmul(_x(64), packed, SIZES), grouped_matmul(_x(64), plain, SIZES))


@needs_native
def test_one_matrix_is_in_memory_at_a_time_while_a_stack_is_packed():
    alive = most = 0

    class Weight(BlockWeight):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def read(group: int) -> BlockWeight:
        nonlocal alive, most
        one = random_blocks(32, 16, 32, *FORMATS[0], seed=group)
        alive += 1
        most = max(most, alive)
        return Weight(values=one.values, scales=one.scales)

    packed = prepare(BlockGroups(shape=(64, 32, 16), read=read), platform="cpu")
    assert packed.shape == (64, 32, 16)
    assert alive == 0
    assert most == 1


@needs_native
def test_a_call_copies_no_weight():
    packed = prepare(_groups(64, 70, 32, *FORMATS[0]), platform="cpu")
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), packed).at_layer(1)
    assert "copy" not in jax.jit(grouped_matmul).lower(_x(64), stack, SIZES).compile().as_text()


def test_other_platforms_get_the_matrices():
    groups = _groups(64, 6, 32, *FORMATS[1])
    np.testing.assert_array_equal(prepare(groups, platform="tpu", dtype="float32"), _matrices(groups))


def test_blocks_that_one_call_cannot_read_are_refused():
    groups = _groups(64, 6, 32, *FORMATS[0])
    with pytest.raises(ValueError, match=r"in blocks already, so quantize must be None, not 'int8'"):
        prepare(groups, quantize="int8", platform="cpu")


@needs_native
def test_groups_of_different_formats_are_refused():
    weights = [random_blocks(64, 6, 32, *form) for form in (FORMATS[0], FORMATS[3])]
    with pytest.raises(ValueError, match=r"group 1 is .*int8.*, but that of group 0 is .*uint4.*one kernel call"):
        prepare(BlockGroups(shape=(2, 64, 6), read=lambda group: weights[group]), platform="cpu")


@pytest.mark.parametrize("implementation", ["reference", "tiles", "ragged_dot"])
def test_int4_of_other_platforms_is_the_product_with_its_matrices(implementation):
    w = np.random.default_rng(0).standard_normal((2 * GROUPS, 64, 96), np.float32)
    plain = np.stack([quantize_int4(each).dequantize() for each in w])
    got, wanted = (
        grouped_matmul(_x(64), weight, SIZES, first_group=GROUPS, implementation=implementation)
        for weight in (prepare(w, quantize="int4", platform="gpu"), jnp.asarray(plain))
    )
    np.testing.assert_array_equal(got, wanted)
