"""Weights of 4 bits for accelerators, in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.matmul import BlockWeight, Division, Int4Weight, linear, pack_int4, prepare, quantize_int4, swiglu
from pallas_kernels.matmul.int4 import float_halves, unpack_int4
from tests.pallas_kernels.matmul.random_blocks import random_blocks

INT4 = [("uint4", False, "float16"), ("uint4", True, "float16"), ("uint4", True, "float32")]


def _x(rows: int, depth: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, depth), np.float32), dtype)


def _stack(*weights: BlockWeight) -> Int4Weight:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(pack_int4, weights))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("form", INT4, ids=str)
def test_the_numbers_are_those_of_the_blocks(form, size):
    blocks = random_blocks(256, 5, size, *form)
    w = pack_int4(blocks)
    assert (w.shape, w.size) == ((256, 5), size)
    # An offset that is counted from the middle of the numbers has one rounding of its own.
    np.testing.assert_allclose(jax.tree.map(jnp.asarray, w).dequantize(), blocks.dequantize(), rtol=0, atol=form[1] * 1e-5)


def test_every_byte_has_its_two_numbers():
    values = jnp.arange(256, dtype=jnp.uint8).reshape(32, 8)
    found = [half.values / half.unit - half.bias for half in float_halves(values)]
    np.testing.assert_array_equal(jnp.concatenate(found), unpack_int4(values))
    assert sorted(np.unique(found[0])) == list(range(-8, 8))


@pytest.mark.parametrize("form", INT4, ids=str)
def test_products_are_those_of_the_matrix_in_the_dtype_of_the_activations(form):
    parts = [random_blocks(128, 64, 32, *form, seed=seed) for seed in range(3)]
    w = _stack(*parts).at_layer(2)
    for dtype in ("float32", "bfloat16"):
        plain = jnp.asarray(jax.tree.map(jnp.asarray, pack_int4(parts[2])).dequantize(), dtype)
        np.testing.assert_array_equal(linear(_x(7, 128, dtype), w), linear(_x(7, 128, dtype), plain))
        np.testing.assert_array_equal(swiglu(_x(7, 128, dtype), w), swiglu(_x(7, 128, dtype), plain))


def test_prepare_quantizes_as_for_a_cpu():
    w = np.random.default_rng(0).standard_normal((128, 6), np.float32)
    for platform in ("tpu", "gpu"):
        prepared = prepare(w, quantize="int4", platform=platform)
        assert isinstance(prepared, Int4Weight)
        assert prepared.values.nbytes == w.size / 2
        np.testing.assert_array_equal(prepared.dequantize(), quantize_int4(w).dequantize())


@pytest.mark.parametrize(("axis", "of_inputs"), [("tensor", False), ("tensor", True), (None, True)])
def test_devices_multiply_their_own_part(axis, of_inputs):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    blocks = random_blocks(256, 64, 32, *INT4[1])
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    w = _stack(blocks, blocks)
    divided = Int4Weight(
        values=w.values,
        scales=w.scales,
        offsets=w.offsets,
        layer=jnp.int32(1),
        division=Division(mesh=mesh, axis=axis, of_inputs=of_inputs),
    )
    x = _x(4, 256)
    np.testing.assert_allclose(jax.jit(linear)(x, divided), x @ blocks.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("k", "size", "form"), [(96, 32, INT4[0]), (64, 16, INT4[0]), (64, 32, ("int8", False, "float16"))], ids=str
)
def test_other_blocks_are_refused(k, size, form):
    with pytest.raises(ValueError, match=rf"blocks of {size} numbers of {form[0]}, {k} inputs; int4 needs .* dequantize"):
        pack_int4(random_blocks(k, 3, size, *form))
