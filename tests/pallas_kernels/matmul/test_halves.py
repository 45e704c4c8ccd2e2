"""Products with int8 weights in two halves of int8, as GPUs of compute capability 7.5 compute them; XLA does so anywhere."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import Int8Weight, halves, linear, quantize_int8, swiglu


def weight(*shape: int, seed: int = 1) -> tuple[Int8Weight, np.ndarray]:
    """An int8 weight [..., K, N] whose inputs are last, and what it stands for."""
    values, scales = quantize_int8(np.random.default_rng(seed).standard_normal(shape, np.float32))
    exact = values.astype(np.float64) * scales[..., None, :]
    stored = Int8Weight(values=jnp.asarray(values.swapaxes(-1, -2)), scales=jnp.asarray(scales), inputs_last=True)
    return stored, exact


def rows(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_halves_of_a_row_are_its_numbers_in_16_bits(dtype: str) -> None:
    x = jnp.concatenate([rows(6, 256, dtype=dtype), jnp.zeros((1, 256), dtype), 1e4 * rows(1, 256, seed=2, dtype=dtype)])
    high, low, factors = halves.half_rows(x)
    whole = 256 * np.asarray(high, np.int64) + np.asarray(low)
    wide = np.asarray(x, np.float64)
    assert (np.abs(whole).max(axis=1) == [32639] * 6 + [0, 32639]).all()
    assert (np.abs(whole * np.asarray(factors, np.float64) - wide) <= np.asarray(factors) * 0.501).all()
    assert (np.asarray(halves.half_rows(-x)[0], np.int64) * 256 + np.asarray(halves.half_rows(-x)[1]) == -whole).all()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64])
def test_the_product_is_that_of_rows_in_16_bits(num_rows: int) -> None:
    x, (w, exact) = rows(num_rows, 320), weight(320, 48)
    high, low, factors = halves.half_rows(x)
    rounded = (256 * np.asarray(high, np.float64) + np.asarray(low)) * np.asarray(factors, np.float64)
    found = jax.jit(linear)(x, w)
    np.testing.assert_allclose(found, rounded @ exact, rtol=1e-6, atol=1e-5)  # a sum is rounded once
    error = np.abs(np.asarray(found) - np.asarray(x, np.float64) @ exact).max()
    assert error <= 2.0**-16 * np.abs(x).max() * np.abs(exact).sum(axis=0).max()
    plain = replace(w, values=w.inputs_first, inputs_last=False)
    assert plain.shape == w.shape == (320, 48)
    np.testing.assert_allclose(found, linear(x, plain), atol=2e-3)


def test_stacks_leading_axes_and_gates() -> None:
    x, (w, exact) = rows(2, 3, 64), weight(4, 64, 64)
    assert w.shape == (4, 64, 64)
    wide = np.asarray(x, np.float64)
    for layer in (0, 3):
        np.testing.assert_allclose(linear(x, w.at_layer(layer)), wide @ exact[layer], atol=2e-3)
        y = wide @ exact[layer]
        gate, up = y[..., :32], y[..., 32:]
        np.testing.assert_allclose(swiglu(x, w.at_layer(layer)), gate / (1 + np.exp(-gate)) * up, atol=1e-2)

    def step(x: jax.Array, w: Int8Weight) -> tuple[jax.Array, None]:
        return linear(x, w, residual=x) / 8, None

    for each in exact:
        wide = (wide + wide @ each) / 8
    np.testing.assert_allclose(jax.lax.scan(step, x, w)[0], wide, atol=1e-3)


def test_the_largest_sums_are_exact() -> None:
    x = jnp.asarray([[1.0, -32639.0 / 32512][i % 2] for i in range(2)] * (halves.MOST_INPUTS // 2))[None]
    values = jnp.where(x > 0, 127, -127).astype(jnp.int8) * jnp.ones((4, 1), jnp.int8)
    whole = np.round(np.asarray(x, np.float64) / (np.abs(x).max() / 32639))
    scale = np.abs(np.asarray(x, np.float64)).max() / 32639
    found = halves.multiply(x, values)
    np.testing.assert_allclose(found, np.full((1, 4), 127 * np.abs(whole).sum() * scale), rtol=1e-6)
    with pytest.raises(ValueError, match=r"x has 131076 inputs, but int32 sums of halves hold 131072"):
        halves.multiply(jnp.ones((1, halves.MOST_INPUTS + 4)), jnp.ones((4, halves.MOST_INPUTS + 4), jnp.int8))


def test_the_derivative_is_that_of_rows_that_are_not_rounded() -> None:
    x, (w, exact) = rows(5, 64), weight(64, 32)
    found = jax.grad(lambda x: jnp.sum(linear(x, w) ** 2))(x)
    np.testing.assert_allclose(found, 2 * np.asarray(linear(x, w), np.float64) @ exact.T, rtol=1e-4, atol=1e-2)


def test_only_whole_words_of_weights_on_gpus_that_need_it() -> None:
    assert halves.is_used((64, 128), "7.5")
    assert halves.is_used((24, 64, 128), "7.5")
    for shape in ((62, 128), (64, 126), (2**18, 128)):
        assert not halves.is_used(shape, "7.5")
    for capability in ("7.0", "8.0", "9.0"):
        assert not halves.is_used((64, 128), capability)
    assert not halves.is_used((64, 128))  # a CPU
