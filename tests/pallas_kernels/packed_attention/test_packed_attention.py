"""Packed attention and its derivative against the reference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.packed_attention import packed_attention, tiles
from pallas_kernels.ragged_attention import Scoring

T, H, K, D = 40, 4, 2, 8
STARTS = np.array([0, 3, 3, 20, 21, 37, 37], np.int32)  # empty ones, one token, and three tokens of padding


def inputs(dtype=jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((T, heads, D)), dtype) for heads in (H, K, K))


def scoring(window: int | None, cap: float | None, arrays: tuple[jax.Array, jax.Array] | None) -> Scoring:
    slopes, sinks = arrays or (None, None)
    return Scoring(scale=0.4, soft_cap=cap, sliding_window=window, alibi_slopes=slopes, sinks=sinks)


def results(implementation, q, k, v, arrays, *, window, cap):
    """A weighted sum of the results, and the results."""
    out = packed_attention(q, k, v, jnp.asarray(STARTS), scoring(window, cap, arrays), implementation=implementation)
    weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out.astype(jnp.float32) * weights), out


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("implementation", ["tiles", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("window", "cap", "extra"),
    [
        pytest.param(None, None, False, marks=pytest.mark.slow, id="plain"),
        pytest.param(5, 2.0, True, id="window, cap, slopes, sinks"),
    ],
)
def test_results_and_derivatives_are_those_of_the_reference(monkeypatch, implementation, window, cap, extra):
    monkeypatch.setattr(tiles, "_TILE", 16)
    rng = np.random.default_rng(1)
    arrays = tuple(jnp.asarray(rng.standard_normal(H), jnp.float32) for _ in range(2)) if extra else None

    def of(implementation):
        function = partial(results, implementation, window=window, cap=cap)
        over = (0, 1, 2, 3) if extra else (0, 1, 2)
        (_, out), gradients = jax.jit(jax.value_and_grad(function, argnums=over, has_aux=True))(*inputs(), arrays)
        return out, gradients

    got, want = of(implementation), of("reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
    assert not np.asarray(got[0])[STARTS[-1] :].any()


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_the_native_kernel_has_the_same_bits_whatever_else_is_packed():
    q, k, v = inputs()
    together = packed_attention(q, k, v, jnp.asarray(STARTS), scoring(None, None, None))
    part = slice(3, 20)
    alone = packed_attention(q[part], k[part], v[part], jnp.asarray([0, 17], jnp.int32), scoring(None, None, None))
    np.testing.assert_array_equal(together[part], alone)


def test_unknown_implementations_and_shapes_are_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="implementation is 'flash' but must be one of 'reference', 'tiles', 'cpu'"):
        packed_attention(q, k, v, jnp.asarray(STARTS), scoring(None, None, None), implementation="flash")
