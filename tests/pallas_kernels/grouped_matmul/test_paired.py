"""Pairs of plain weights and their panels: the products of the panels, the derivatives of the plain weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.grouped_matmul import PairedGroups, grouped_matmul, grouped_swiglu, pair, prepare

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
SIZES = (3, 0, 2)  # of six rows, one has no group


@pytest.mark.parametrize("gated", [False, True], ids=["matmul", "swiglu"])
def test_a_pair_has_the_bits_of_packed_groups_and_the_derivative_of_the_plain_ones(gated):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 19, 70)), jnp.float32)  # neither a whole number of panels nor of steps
    x = jnp.asarray(rng.normal(size=(6, 19)), jnp.float32)
    product, sizes = grouped_swiglu if gated else grouped_matmul, jnp.array(SIZES, jnp.int32)

    def loss(x, w, *, paired):
        y = product(x, pair(w, platform="cpu", gated=gated) if paired else w, sizes)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    (_, got), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w, paired=True)
    np.testing.assert_array_equal(got, product(x, prepare(np.asarray(w), platform="cpu", gated=gated), sizes))
    wanted = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w, paired=False)[0]
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_pairs_are_made_on_cpus_and_for_one_of_the_products():
    w = jnp.ones((2, 4, 6))
    assert pair(w, platform="tpu") is w
    paired = pair(w, platform="cpu", gated=True)
    assert isinstance(paired, PairedGroups)
    x, sizes = jnp.ones((3, 4)), jnp.array([1, 2], jnp.int32)
    with pytest.raises(ValueError, match="w was paired with gated=True, for grouped_swiglu"):
        grouped_matmul(x, paired, sizes)
    with pytest.raises(ValueError, match="w was paired with gated=False"):
        grouped_swiglu(x, pair(w, platform="cpu"), sizes)
