"""Norms: every implementation against float64, rows that do not depend on one another, derivatives, refusals."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.norm import IMPLEMENTATIONS, layer_norm, rms_norm
from tests.shape_checks import unchecked

needs_compiler = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")
NAMES = [name if name != "cpu" else pytest.param(name, marks=needs_compiler) for name in IMPLEMENTATIONS]
ROUNDING = 2e-6  # float32 sums of up to a thousand squares, in any order


def expected(x: np.ndarray, weight, bias, *, eps: float, offset: float, centered: bool) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if centered else x
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (weight.astype(np.float64) + offset)
    return y if bias is None else y + bias


def example(shape, weight_axes=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (shape, shape[-weight_axes:], shape[-weight_axes:])
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return x + 0.5, weight, bias


@pytest.mark.parametrize("implementation", [*NAMES, None])
@pytest.mark.parametrize(
    ("shape", "weight_axes"),
    [
        ((5, 576), 1),
        ((1, 100), 1),
        ((3, 7), 1),
        ((300, 257), 1),
        ((4, 3, 40), 1),
        ((4, 3, 40), 2),
    ],
)
def test_norms_equal_their_definitions(implementation, shape, weight_axes) -> None:
    x, weight, bias = example(shape, weight_axes)
    offsets, biases = (0.0, 1.0), (None, bias)

    @jax.jit  # one program for the four norms
    def norms(x, weight, biases):
        plain = [rms_norm(x, weight, eps=1e-5, offset=offset, implementation=implementation) for offset in offsets]
        return plain, [layer_norm(x, weight, bias, eps=1e-5, implementation=implementation) for bias in biases]

    plain, centered = norms(x, weight, biases)
    for got, offset in zip(plain, offsets, strict=True):
        np.testing.assert_allclose(
            got, expected(x, weight, None, eps=1e-5, offset=offset, centered=False), atol=ROUNDING, rtol=ROUNDING
        )
    for got, some_bias in zip(centered, biases, strict=True):
        np.testing.assert_allclose(
            got, expected(x, weight, some_bias, eps=1e-5, offset=0, centered=True), atol=5 * ROUNDING, rtol=ROUNDING
        )


@needs_compiler
@pytest.mark.parametrize("width", [576, 100, 1024, 7])
def test_a_row_is_rounded_the_same_for_any_number_of_rows(width: int) -> None:
    x, weight, bias = example((400, width), seed=width)
    counts = (400, 1, 2, 3, 4, 8, 33, 399)
    for run in (partial(rms_norm, eps=1e-6), lambda x, w: layer_norm(x, w, jnp.asarray(bias), eps=1e-6)):
        # One program for all of them; the kernel is called for each.
        norms = jax.jit(lambda inputs, w, run=run: [run(x, w) for x in inputs])
        whole, *parts = norms([x[-count:] for count in counts], jnp.asarray(weight))
        for count, some in zip(counts[1:], parts, strict=True):
            np.testing.assert_array_equal(some, whole[-count:])


@pytest.mark.parametrize("implementation", NAMES)
def test_rows_in_use_do_not_see_the_padding_behind_them(implementation) -> None:
    x, weight, _ = example((6, 3, 40))
    got = jax.jit(partial(rms_norm, eps=1e-6, implementation=implementation))(
        jnp.asarray(x), jnp.asarray(weight), num_rows=jnp.int32(4)
    )
    np.testing.assert_allclose(
        got[:4], expected(x, weight, None, eps=1e-6, offset=0, centered=False)[:4], atol=ROUNDING, rtol=ROUNDING
    )
    assert np.isfinite(got).all()


@pytest.mark.parametrize("implementation", NAMES)
def test_the_dtype_of_the_rows_is_kept(implementation) -> None:
    x, weight, _ = example((4, 64))
    got = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight), eps=1e-6, implementation=implementation)
    assert got.dtype == jnp.bfloat16


@needs_compiler
def test_the_native_norm_has_the_derivative_of_the_other() -> None:
    x, weight, bias = map(jnp.asarray, example((4, 20)))

    def loss(x, weight, bias, implementation):
        return jnp.sum(jnp.sin(layer_norm(x, weight, bias, eps=1e-3, implementation=implementation)))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnames="implementation")
    got, want = (gradient(x, weight, bias, name) for name in ("cpu", "xla"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_invalid_arguments_are_refused_by_name() -> None:
    x, weight, bias = map(jnp.asarray, example((4, 20)))
    with unchecked(), pytest.raises(ValueError, match=r"weight is \[19\]"):
        rms_norm(x, weight[1:], eps=1e-6)
    with unchecked(), pytest.raises(ValueError, match=r"bias is \[19\]"):
        layer_norm(x, weight, bias[1:], eps=1e-6)
    with unchecked(), pytest.raises(ValueError, match="'xla', 'cpu'"):
        rms_norm(x, weight, eps=1e-6, implementation="gpu")
