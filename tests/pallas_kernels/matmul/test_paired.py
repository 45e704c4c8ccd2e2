"""A pair of a plain weight and its panels: the products of the panels, the derivatives of the plain weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.matmul import PairedWeight, linear, pair, prepare, swiglu

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True], ids=["linear", "swiglu"])
def test_a_pair_has_the_bits_of_the_packed_weight_and_the_derivative_of_the_plain_one(dtype, gated):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(19, 70)), dtype)  # neither a whole number of panels nor of steps
    x = jnp.asarray(rng.normal(size=(5, 19)), jnp.float32)
    product = swiglu if gated else linear
    packed = prepare(np.asarray(w), platform="cpu", gated=gated)

    def loss(x, w, *, paired):
        y = product(x, pair(w, platform="cpu", gated=gated) if paired else w.astype(jnp.float32), num_rows=jnp.int32(4))
        return jnp.sum(y[:4] * jnp.cos(jnp.arange(y[:4].size, dtype=jnp.float32)).reshape(4, -1)), y

    (_, got), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w, paired=True)
    np.testing.assert_array_equal(got, product(x, packed, num_rows=jnp.int32(4)))
    wanted = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w, paired=False)[0]
    for a, b in zip(gradients, wanted, strict=True):
        tolerance = 1e-5 if a.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance * float(jnp.abs(b).max()))


def test_only_cpus_pair():
    w = jnp.ones((4, 6))
    assert isinstance(pair(w, platform="cpu"), PairedWeight)
    assert pair(w, platform="tpu") is w
