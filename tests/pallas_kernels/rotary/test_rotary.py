"""Rotation and split of a fused projection: every implementation against NumPy, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.rotary import IMPLEMENTATIONS, rotary
from tests.shape_checks import unchecked

needs_compiler = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")
NAMES = [name if name != "cpu" else pytest.param(name, marks=needs_compiler) for name in IMPLEMENTATIONS]


def example(tokens=5, heads=3, kv_heads=1, dim=40, pairs=20):
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((tokens, heads + 2 * kv_heads, dim)).astype(np.float32)
    angle = rng.uniform(0, 6, (tokens, pairs)).astype(np.float32)
    return qkv, np.cos(angle), np.sin(angle)


def complex_rotation(x, cos, sin):
    """The same as a product of complex numbers."""
    pairs = cos.shape[1]
    turned = (x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]) * (cos + 1j * sin)[:, None]
    return np.concatenate([turned.real, turned.imag, x[..., 2 * pairs :]], axis=-1)


@pytest.mark.parametrize("implementation", [*NAMES, None])
@pytest.mark.parametrize(("tokens", "kv_heads", "pairs"), [(5, 1, 20), (130, 3, 20), (1, 2, 7), (33, 1, 16)])
def test_queries_and_keys_are_rotated_and_values_are_not(implementation, tokens, kv_heads, pairs) -> None:
    qkv, cos, sin = example(tokens=tokens, kv_heads=kv_heads, pairs=pairs)
    call = jax.jit(lambda *a: rotary(*a, num_heads=3, implementation=implementation))
    q, k, v = call(*map(jnp.asarray, (qkv, cos, sin)))
    turned = complex_rotation(qkv[:, : 3 + kv_heads], cos, sin)
    np.testing.assert_allclose(np.concatenate([q, k], axis=1), turned, atol=1e-6)
    np.testing.assert_array_equal(v, qkv[:, 3 + kv_heads :])


@pytest.mark.parametrize("implementation", NAMES)
def test_the_dtype_of_the_projection_is_kept(implementation) -> None:
    qkv, cos, sin = example()
    parts = rotary(
        jnp.asarray(qkv, jnp.bfloat16), jnp.asarray(cos), jnp.asarray(sin), num_heads=3, implementation=implementation
    )
    assert [part.dtype for part in parts] == [jnp.bfloat16] * 3


def test_invalid_arguments_are_refused_by_name() -> None:
    qkv, cos, sin = map(jnp.asarray, example())
    with unchecked(), pytest.raises(ValueError, match="qkv is"):
        rotary(qkv, cos, sin, num_heads=4)
    with unchecked(), pytest.raises(ValueError, match="at most D / 2 = 20"):
        rotary(qkv, jnp.ones((5, 21)), jnp.ones((5, 21)), num_heads=3)
    with unchecked(), pytest.raises(ValueError, match="'xla', 'cpu'"):
        rotary(qkv, cos, sin, num_heads=3, implementation="gpu")
