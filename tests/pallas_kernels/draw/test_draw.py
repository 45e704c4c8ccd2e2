"""Tokens drawn with the native kernel are those of the program that computes every logarithm, to the last one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.sampling.random_bits import bits_of, random_bits, row_keys
from fastgen_jax.engine.sampling.rows import row_argmax, row_max, sum_in_any_order
from fastgen_jax.engine.sampling.sampler import _speeds
from pallas_kernels import draw, native

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")


@jax.jit
def drawn(weights, seeds, positions):
    return row_argmax(_speeds(weights, random_bits(seeds, positions, weights.shape[1])))


@jax.jit
def candidates(logits, weights, seeds, positions, is_drawn):
    assert draw.is_available()
    keys = row_keys(seeds, positions)
    ids = draw.front_runners(logits, weights, keys, is_drawn)
    few = jnp.take_along_axis(weights, ids, axis=1, mode="clip")
    fastest = jnp.argmax(_speeds(few, bits_of(keys, ids.astype(jnp.uint32))), axis=1, keepdims=True)
    return ids, jnp.take_along_axis(ids, fastest, axis=1, mode="clip")[:, 0]


def masses(probabilities: np.ndarray) -> np.ndarray:
    return np.round(probabilities / probabilities.sum(axis=1, keepdims=True) * 2.0**30).astype(np.int32)


def rows_of(kind: str, rows: int, vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "flat":
        return masses(np.ones((rows, vocab_size)))
    if kind == "one token":
        return masses(np.eye(vocab_size)[rng.integers(0, vocab_size, rows)])
    if kind == "two tokens":
        return masses(np.eye(vocab_size)[rng.integers(0, vocab_size, (2, rows))].sum(axis=0))
    return masses(np.exp(rng.normal(0, 3, (rows, vocab_size))))


@pytest.mark.parametrize("kind", ["flat", "one token", "two tokens", "logits"])
@pytest.mark.parametrize(("rows", "vocab_size"), [(500, 1), (500, 7), (2000, 203), (64, 4999)])
def test_tokens_are_those_of_all_logarithms(kind, rows, vocab_size) -> None:
    weights = jnp.asarray(rows_of(kind, rows, vocab_size))
    seeds, positions = jnp.arange(rows, dtype=jnp.uint32) * 7919, jnp.arange(rows, dtype=jnp.int32) % 91
    nothing = jnp.zeros(weights.shape, jnp.float32)
    ids, tokens = candidates(nothing, weights, seeds, positions, jnp.ones(rows, bool))
    np.testing.assert_array_equal(tokens, drawn(weights, seeds, positions))
    assert np.all(np.diff(ids, axis=1) >= 0)


def test_rows_that_are_not_drawn_take_the_first_of_the_largest_logits() -> None:
    logits = np.random.default_rng(1).integers(-3, 4, (40, 203)).astype(np.float32)
    logits[0] = -np.inf
    weights = jnp.ones(logits.shape, jnp.int32)
    zeros = jnp.zeros(40, jnp.int32)
    _, tokens = candidates(jnp.asarray(logits), weights, zeros.astype(jnp.uint32), zeros, zeros > 0)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


def test_a_row_without_weights_or_with_nan_gets_a_token_of_the_vocabulary() -> None:
    logits, weights = np.full((2, 21), np.nan, np.float32), np.zeros((2, 21), np.int32)
    zeros = jnp.zeros(2, jnp.int32)
    ids, _ = candidates(
        jnp.asarray(logits), jnp.asarray(weights), zeros.astype(jnp.uint32), zeros, jnp.asarray([True, False])
    )
    assert np.all((ids >= 0) & (np.asarray(ids) < 21))


@jax.jit
def one_pass(logits, seeds, positions, temperature, targets, wants):
    assert draw.is_available()
    return draw.in_one_pass(logits, seeds, positions, temperature, targets, wants)


@jax.jit
def by_steps(logits, seeds, positions, temperature):
    """The same from the kernels and programs that need whole arrays."""
    largest, keys = row_max(logits), row_keys(seeds, positions)
    ratios = draw.exponentials(logits, largest, temperature)
    total = sum_in_any_order(ratios)
    weights = jnp.round(ratios * (2.0**30 / total)[:, None]).astype(jnp.int32)
    ids = draw.front_runners(logits, weights, keys, jnp.ones(len(logits), bool))
    few = jnp.take_along_axis(weights, ids, axis=1, mode="clip")
    return ids, few, bits_of(keys, ids.astype(jnp.uint32)), total


@pytest.mark.parametrize(("rows", "vocab_size"), [(3, 1), (50, 7), (40, 203), (8, 4999)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_one_pass_finds_to_the_last_bit_what_whole_arrays_give(rows, vocab_size, temperature) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 4, (rows, vocab_size)), jnp.float32)
    seeds, positions = jnp.arange(rows, dtype=jnp.uint32) * 7919, jnp.arange(rows, dtype=jnp.int32)
    divisors, none = jnp.full(rows, temperature, jnp.float32), jnp.full(rows, vocab_size, jnp.int32)
    found = one_pass(logits, seeds, positions, divisors, none, jnp.int32(1))
    ids, few, bits, total = by_steps(logits, seeds, positions, divisors)
    for got, want in ((found.ids, ids), (found.weights, few), (found.bits, bits), (found.totals, total)):
        np.testing.assert_array_equal(got, want)
    raw = by_steps(logits, seeds, positions, jnp.ones(rows, jnp.float32))[-1]
    np.testing.assert_array_equal(found.raw_totals, raw)
    np.testing.assert_array_equal(found.largest, logits.max(axis=1))
    values = np.take_along_axis(np.asarray(logits), np.asarray(ids), axis=1)
    np.testing.assert_array_equal(found.ranks, 1 + (logits[:, None] > values[:, :, None]).sum(axis=2))
    exact = np.asarray(logits, np.float64) / np.float32(temperature)
    exact = np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(found.totals, exact, rtol=2e-6)  # exponents up to 100 are rounded to float32


def test_rows_with_a_target_are_not_drawn_and_cold_ones_take_the_first_of_the_largest_logits() -> None:
    logits = np.random.default_rng(1).integers(-3, 4, (6, 203)).astype(np.float32)
    rows, zeros = len(logits), np.zeros(len(logits), np.int32)
    temperature, targets = np.float32([1, 0, 0, 1, 0, 1]), np.int32([5, 5, 203, 203, 203, 202])
    found = one_pass(jnp.asarray(logits), zeros.astype(np.uint32), zeros, temperature, targets, np.int32(0))
    assert np.asarray(found.ids)[:, 0].tolist()[:3] == [5, 5, int(np.argmax(logits[2]))]
    is_drawn = (temperature > 0) & (targets == 203)
    np.testing.assert_array_equal(np.asarray(found.weights).max(axis=1) > 0, is_drawn)
    assert (np.asarray(found.ranks) == 0).all()
    assert (np.asarray(found.totals)[temperature > 0] > 1).all()
    assert np.asarray(found.ids).shape == (rows, draw.NUM_FRONT_RUNNERS)
