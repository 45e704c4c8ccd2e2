"""Multiplies by a packed weight and prints whether the compiled program came from JAX's persistent cache."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import linear, prepare

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
w = np.random.default_rng(0).standard_normal((33, 20), np.float32)
x = np.ones((3, 33), np.float32)
y = jax.jit(linear)(jnp.asarray(x), prepare(w, platform="cpu"))
np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)
print(len(hits) > 0)
