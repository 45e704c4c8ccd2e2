"""Multiplies with weights prepared for the CPU, in float32 and int8, compares with NumPy, and prints how they are stored."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import linear, prepare, quantize_int8

w = np.random.default_rng(0).standard_normal((33, 20), np.float32)
x = np.ones((3, 33), np.float32)
plain, int8 = prepare(w, platform="cpu"), prepare(w, platform="cpu", quantize="int8")
values, scales = quantize_int8(w)
np.testing.assert_allclose(linear(jnp.asarray(x), plain), x @ w, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(linear(jnp.asarray(x), int8), x @ (values * scales), rtol=1e-4, atol=1e-4)
print(type(plain).__name__, type(int8).__name__)
