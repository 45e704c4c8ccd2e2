"""Convolution and recurrence of the native kernels: their definitions, and the same bits for every split."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.recurrence import Chunks, convolution, recurrence
from pallas_kernels.recurrence.reference import convolved, recurred
from tests.shape_checks import unchecked

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")

LENGTHS = (37, 9, 1)  # of the sequences; sequence s has its states at places[s]
PLACES, NUM_PLACES, TOKENS = (4, 0, 2), 6, 64
# Sums of some ten terms in float32 against float64.
TOLERANCE = 1e-5
TOGETHER = ((37,), (9,), (1,))
SPLITS = (TOGETHER, ((1,) * 37, (2, 3, 4), (1,)), ((4, 16, 17), (0, 9), (0, 0, 1)), ((0, 30, 5, 2), (7, 0, 2), (1,)))


def steps(splits):
    """For each step the chunks (sequence, start, length)."""
    for i in range(max(map(len, splits))):
        yield [(s, sum(split[:i]), split[i]) for s, split in enumerate(splits) if i < len(split)]


def chunks_of(step) -> Chunks:
    """With a chunk that is padding: its place is beyond the pool."""
    lengths = np.asarray([length for *_, length in step] + [3])
    starts = np.asarray([start for _, start, _ in step] + [0])
    values = ([PLACES[s] for s, *_ in step] + [NUM_PLACES], starts, starts + lengths, np.cumsum(lengths) - lengths)
    return Chunks(*(jnp.asarray(x, jnp.int32) for x in values))


def packed(sequences, step):
    """The tokens of a step; those of padding are not numbers."""
    values = np.concatenate([sequences[s][start : start + length] for s, start, length in step])
    padding = np.full((TOKENS - len(values), *values.shape[1:]), np.nan)
    return jnp.asarray(np.concatenate([values, padding]), jnp.float32)


def in_steps(run, pool, splits, *inputs):
    """The results of each sequence and the last states; `run(*inputs, pool, chunks)` computes a step."""
    results = [[] for _ in LENGTHS]
    for step in steps(splits):
        out, pool = run(*(packed(sequences, step) for sequences in inputs), pool, chunks_of(step))
        first = 0
        for s, _, length in step:
            results[s].append(np.asarray(out)[first : first + length])
            first += length
        np.testing.assert_array_equal(np.asarray(out)[first:], 0.0)
    return [np.concatenate(parts) for parts in results], np.asarray(pool)


def check(run, shape, inputs, expected):
    """Every split has the bits of the first, whose results are those expected; other places keep what was there."""
    pool = np.full((NUM_PLACES, *shape), np.nan, np.float32)
    want, states = in_steps(run, jnp.asarray(pool), TOGETHER, *inputs)
    for got, exact in zip(want, expected, strict=True):
        np.testing.assert_allclose(got, exact, atol=TOLERANCE)
    others = [place for place in range(NUM_PLACES) if place not in PLACES]
    assert np.isnan(states[others]).all()
    for splits in SPLITS[1:]:
        got, again = in_steps(run, jnp.asarray(pool), splits, *inputs)
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(again, states)
    return states


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("key_heads", "heads", "key_dim", "value_dim"), [(1, 3, 16, 64), (2, 4, 7, 21)])
def test_the_recurrence_is_its_definition_and_no_split_changes_a_bit(delta, key_heads, heads, key_dim, value_dim) -> None:
    rng = np.random.default_rng(0)
    keys = [rng.standard_normal((n, key_heads, key_dim)) for n in LENGTHS]
    inputs = (
        [rng.standard_normal((n, key_heads, key_dim)) for n in LENGTHS],
        [k / np.linalg.norm(k, axis=-1, keepdims=True) for k in keys],
        [rng.standard_normal((n, heads, value_dim)) for n in LENGTHS],
        [-rng.exponential(0.5, (n, heads)) for n in LENGTHS],
        [rng.uniform(0, 1, (n, heads)) for n in LENGTHS],
    )
    exact = [recurred(*sequence, delta=delta) for sequence in zip(*inputs, strict=True)]
    run = jax.jit(partial(recurrence, delta=delta))
    states = check(run, (heads, key_dim, value_dim), inputs, [out for out, _ in exact])
    np.testing.assert_allclose(states[list(PLACES)], [state for _, state in exact], atol=TOLERANCE)


@pytest.mark.parametrize(("width", "channels", "silu"), [(2, 5, False), (4, 70, True)])
def test_the_convolution_is_its_definition_and_no_split_changes_a_bit(width, channels, silu) -> None:
    rng = np.random.default_rng(1)
    kernel, bias = rng.standard_normal((width, channels)), rng.standard_normal(channels)
    wide = [rng.standard_normal((n, channels + 6)) for n in LENGTHS]

    def run(x, tails, chunks):
        weights = (jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32) if silu else None)
        return convolution(x, *weights, tails, chunks, column=3, silu=silu)

    exact = [convolved(x[:, 3:-3], kernel) + silu * bias for x in wide]
    check(jax.jit(run), ((width - 1) * channels,), (wide,), [y / (1 + np.exp(-y)) if silu else y for y in exact])


def test_invalid_shapes_are_refused() -> None:
    chunks, x = chunks_of([(0, 0, 1)]), jnp.zeros((4, 8))
    with unchecked(), pytest.raises(ValueError, match=r"kernel is \[4, 8\] and tails \[6, 8\]"):
        convolution(x, jnp.zeros((4, 8)), None, jnp.zeros((6, 8)), chunks)
    q, v, gates = jnp.zeros((4, 2, 8)), jnp.zeros((4, 3, 8)), jnp.zeros((4, 3))
    with unchecked(), pytest.raises(ValueError, match="H a multiple of K"):
        recurrence(q, q, v, gates, gates, jnp.zeros((6, 3, 8, 8)), chunks, delta=False)
