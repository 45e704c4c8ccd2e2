"""The sampler compared with a slow one in float64, and what must not change its tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.engine.sampling import raw_logprobs
from fastgen_jax.engine.sampling import sampler as sampling
from fastgen_jax.engine.sampling.random_bits import random_bits
from fastgen_jax.engine.sampling.rows import row_argmax
from fastgen_jax.engine.sampling.state import init_state, set_masks
from fastgen_jax.engine.sampling.tables import SamplingBatch
from tests.engine.sampling_rig import TOP, R, S, V, batch_of, run, sampling_rows, views_of

# Probabilities are float32 and top-p's limit is a product of such: either side is right within this distance.
MASS_TOLERANCE = 1e-5

weights_of = jax.jit(lambda logits, batch: sampling._weights(logits, batch, has_branches=True).values)
argmax_of = jax.jit(row_argmax)


def draws(logits: np.ndarray, count: int = 4096, **columns: Any) -> np.ndarray:
    """Tokens of one row of logits at positions 0 ... count - 1, R at a time."""
    num_rows = 256
    tiled = np.tile(np.asarray(logits, np.float32), (num_rows, 1))
    starts = range(0, count, num_rows)
    batches = [sampling_rows(num_rows, len(logits), positions=start + np.arange(num_rows), **columns) for start in starts]
    return np.concatenate([np.asarray(run(tiled, batch)[0].tokens) for batch in batches])


def softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    below = np.where(x == x.max(), 0, x - np.where(np.isinf(x.max()), 0, x.max()))
    if np.isinf(x.max()):
        below = np.where(x == x.max(), 0, -np.inf)
    return np.exp(below) / np.exp(below).sum()


def kept_tokens(logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The definition: tokens in order of logit, then id; the first k; the first that hold p of those; min-p."""
    order = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
    order = order[: top_k or len(order)]
    p = softmax(logits[order] / temperature)
    num_kept = 1 + int(np.searchsorted(np.cumsum(p), top_p)) if top_p < 1 else len(order)
    return [int(t) for t, share in zip(order[:num_kept], p[:num_kept] / p[0], strict=True) if share >= min_p]


# Greedy


def test_by_default_the_most_likely_token_is_taken_and_the_lowest_id_wins_a_tie() -> None:
    logits = np.zeros((R, V), np.float32)
    logits[0, [190, 7]] = 5
    logits[1, V - 1] = 1
    logits[2] = -np.inf
    logits[3, [150, 160]] = np.inf
    logits[4] = np.arange(V)
    tokens = run(logits, batch_of(views_of(R)))[0].tokens
    np.testing.assert_array_equal(tokens, [7, V - 1, 0, 150, V - 1, 0, 0, 0])


@pytest.mark.parametrize("vocab_size", [1, 5, 127, 128, 129, 1000])
def test_the_argmax_agrees_with_numpy_for_any_size_of_vocabulary(vocab_size: int) -> None:
    logits = np.random.default_rng(vocab_size).integers(0, 50, (6, vocab_size)).astype(np.float32)
    np.testing.assert_array_equal(argmax_of(logits), logits.argmax(axis=1))


def test_a_row_with_nan_still_yields_a_token_of_the_vocabulary() -> None:
    logits = np.full((R, V), np.nan, np.float32)
    for batch in (batch_of(views_of(R)), sampling_rows(R, top_p=0.5)):
        tokens = np.asarray(run(logits, batch)[0].tokens)
        assert ((tokens >= 0) & (tokens < V)).all()


def test_a_greedy_row_stays_greedy_in_a_batch_that_samples() -> None:
    logits = np.random.default_rng(1).normal(size=(R, V)).astype(np.float32)
    temperature = np.where(np.arange(R) % 2, 0, 5)
    tokens = np.asarray(run(logits, sampling_rows(R, temperature=temperature))[0].tokens)
    np.testing.assert_array_equal(tokens[1::2], logits[1::2].argmax(axis=1))
    assert (tokens[::2] != logits[::2].argmax(axis=1)).any()


# What is kept


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.sampled_from([0.001, 0.25, 2.0]),
    infinities=st.sampled_from([(), (-np.inf,), (np.inf,), (np.inf, -np.inf)]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_top_k_top_p_and_min_p_keep_what_their_definition_keeps(seed, grid, infinities, temperature) -> None:
    rng = np.random.default_rng(seed)
    logits = (np.round(rng.normal(size=(R, V)) * rng.uniform(0.1, 6) / grid) * grid).astype(np.float32)
    for value in infinities:
        logits[np.arange(R), rng.integers(0, V, R)] = value
    top_k = rng.choice([0, 1, 2, 7, 50, V - 1, V, V + 5, 2**31 - 1], R)
    top_p = rng.choice([1e-30, 0.01, 0.3, 0.5, 0.9, 0.999, 1], R)
    min_p = rng.choice([0, 0, 0.05, 0.6], R)
    batch = sampling_rows(R, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights = np.asarray(weights_of(logits, batch))
    for row in range(R):
        limits = {"temperature": temperature, "top_k": int(top_k[row])}
        p, q = float(top_p[row]), float(min_p[row])
        kept = set(np.flatnonzero(weights[row]).tolist())
        fewest = kept_tokens(logits[row], top_p=p - MASS_TOLERANCE, min_p=q * (1 + MASS_TOLERANCE), **limits)
        at_most = p + MASS_TOLERANCE if p < 1 else 1
        most = kept_tokens(logits[row], top_p=at_most, min_p=q * (1 - MASS_TOLERANCE), **limits)
        probabilities = softmax(logits[row][most] / temperature)
        unseen = {t for t, share in zip(most, probabilities, strict=True) if share < 2.0**-29}  # rounds to 0
        assert set(fewest) - unseen <= kept <= set(most)


@pytest.mark.parametrize("num_equal", range(2, 65, 7))
def test_of_equal_tokens_top_p_keeps_just_enough_and_the_lowest_ids(num_equal: int) -> None:
    logits = np.full((R, V), -np.inf, np.float32)
    ids = np.arange(num_equal) * 3
    logits[:, ids] = 1.5
    wanted = np.linspace(1, num_equal - 1, R).round().astype(int)
    weights = np.asarray(weights_of(logits, sampling_rows(R, top_p=wanted / num_equal)))
    for row in range(R):
        np.testing.assert_array_equal(np.flatnonzero(weights[row]), ids[: wanted[row]])


def test_of_equal_tokens_top_k_keeps_exactly_k_and_the_lowest_ids() -> None:
    logits = np.zeros((R, V), np.float32)
    logits[:, 120] = 1
    weights = np.asarray(weights_of(logits, sampling_rows(R, top_k=np.arange(1, R + 1))))
    for row in range(R):
        np.testing.assert_array_equal(np.flatnonzero(weights[row]), sorted({120, *range(row)}))


def test_logits_that_differ_in_the_last_bit_are_told_apart() -> None:
    logits = np.full((R, V), -3, np.float32)
    logits[:, 5] = np.nextafter(np.float32(20), np.float32(0))
    logits[:, 6] = 20
    logits[:, 190] = np.nextafter(np.float32(-3), np.float32(0))
    batch = sampling_rows(R, top_k=np.array([1, 2, 3] * 2 + [1, 1]))
    weights = np.asarray(weights_of(logits * 1, batch))
    assert [np.flatnonzero(row).tolist() for row in weights[:2]] == [[6], [5, 6]]
    assert np.flatnonzero(np.asarray(weights_of(logits / 20, batch))[2]).tolist() == [5, 6, 190]


@pytest.mark.parametrize("temperature", [np.finfo(np.float32).tiny, 1e-6, np.finfo(np.float32).max])
def test_extreme_temperatures_neither_overflow_nor_lose_the_most_likely_token(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(R, V)).astype(np.float32) * 100
    weights = np.asarray(weights_of(logits, sampling_rows(R, temperature=temperature)))
    kept = (weights > 0).sum(axis=1)
    assert (weights[np.arange(R), logits.argmax(axis=1)] > 0).all()
    assert (kept == (V if temperature > 1 else 1)).all()


def test_weights_sum_to_less_than_the_largest_int32_even_if_all_tokens_are_equally_likely() -> None:
    vocab_size = 262208  # the largest in use
    for logits in (np.zeros((1, vocab_size)), np.linspace(-12, 0, vocab_size)[None]):
        weights = np.asarray(weights_of(logits.astype(np.float32), sampling_rows(1, vocab_size)), np.int64)
        assert (weights >= 0).all()
        assert 0.98 < weights.sum() / 2**30 < 1.02


# The draw


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8},
    ],
)
def test_tokens_follow_the_renormalized_distribution_of_the_kept_tokens(columns: dict[str, float]) -> None:
    logits = np.full(V, -np.inf, np.float32)
    logits[np.arange(12) * 15] = np.random.default_rng(3).normal(size=12) * 1.5
    limits = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **columns}
    kept = kept_tokens(logits, **limits)
    kept = [token for token in kept if logits[token] > -np.inf]
    tokens = draws(logits, seeds=11, **columns)
    assert set(tokens.tolist()) <= set(kept)
    p = softmax(logits[kept] / limits["temperature"])
    expected = p * len(tokens)
    found = np.array([(tokens == token).sum() for token in kept])
    chi_square = ((found - expected) ** 2 / expected).sum()
    # Mean n, deviation sqrt(2 n) for n degrees of freedom; fixed seeds, so that it always passes or never does.
    freedom = max(len(kept) - 1, 1)
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_neither_end_of_the_random_range_draws_a_token_of_probability_zero() -> None:
    weights = np.zeros((4, V), np.int32)
    weights[0, [3, 150]] = [5, 7]
    weights[1, 3] = 2**30
    weights[2, V - 1] = 1
    weights[3] = 1
    for bits in (0, 1, 2**31, 2**32 - 1):
        drawn = row_argmax(sampling._speeds(jnp.asarray(weights), jnp.full((4, V), bits, jnp.uint32)))
        np.testing.assert_array_equal(drawn, [150, 3, V - 1, 0])


def test_logits_that_differ_in_their_last_bits_draw_the_same_tokens() -> None:
    # What another order of summation in a model does to its logits: 1e-5 of them, in any token. Drawing from a running sum
    # changed one token in a few thousand.
    rng = np.random.default_rng(0)
    count, vocab_size = 64, 4096
    logits = rng.normal(size=(1, vocab_size)).astype(np.float32) * 2
    noisy = logits + rng.uniform(-1e-5, 1e-5, size=(40, 1, vocab_size)).astype(np.float32)
    batch = sampling_rows(count, vocab_size, seeds=np.arange(count), positions=7)
    bits = random_bits(batch.seeds, batch.positions, vocab_size)

    @jax.jit
    def draw(x):
        weights = weights_of(jnp.broadcast_to(x, (count, vocab_size)), batch)
        return row_argmax(sampling._speeds(weights, bits))

    want = np.asarray(draw(logits))
    changed = sum((np.asarray(draw(other)) != want).sum() for other in noisy)
    assert changed <= 1  # of 2,560; the total variation distance allows for 0.02


def test_the_bits_are_those_of_jax_whatever_its_flags() -> None:
    seeds, positions = np.array([0, 1, 2**32 - 1, 7], np.uint32), np.array([0, 5, 2**31 - 1, 5], np.int32)
    bits = np.asarray(random_bits(jnp.asarray(seeds), jnp.asarray(positions), 1001))
    keys = [jax.random.fold_in(jax.random.key(s, impl="threefry2x32"), p) for s, p in zip(seeds, positions, strict=True)]
    with jax.threefry_partitionable(True):
        expected = [jax.random.bits(key, (1001,), jnp.uint32) for key in keys]
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize("work", ["greedy", "sampled", "masked"])
def test_a_program_without_branches_gives_the_results_of_one_with_branches(work: sampling.Work) -> None:
    rng = np.random.default_rng(7)
    logits = jnp.asarray(rng.normal(size=(R, V)) * 2, jnp.float32)
    columns: dict[str, Any] = {"temperature": 0, "any_sampling": 0}
    if work != "greedy":
        columns = {
            "temperature": [0, 0.7, 1, 3, 1, 1, 1, 1],
            "top_k": [0, 5, 0, 20, 1, 0, 0, 100],
            "top_p": [1, 0.5, 0.9, 1, 1, 1, 0.1, 0.8],
            "min_p": [0, 0, 0, 0.2, 0, 0.1, 0, 0],
            "seeds": np.arange(R),
        }
    if work == "masked":
        columns |= {"has_mask": np.arange(R) % 2, "any_masks": 1}
    batch = sampling_rows(R, **columns, slots=np.arange(R), writes_token=1, targets=np.where(np.arange(R) == 5, 3, V))
    masks = rng.integers(-(2**31), 2**31, (S, -(-V // 32))).astype(np.int32)
    expected = run(np.asarray(logits), batch, set_masks(init_state(S, V), range(S), masks))
    sample = jax.jit(sampling.sample, static_argnames=("max_logprobs", "work"))
    state = set_masks(init_state(S, V), range(S), masks)
    program = sample.lower(logits, state, batch, max_logprobs=TOP, work=work)
    assert "stablehlo.case" not in program.as_text()
    found = program.compile()(logits, state, batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_rows", [1, R])
def test_other_rows_and_the_position_in_the_batch_do_not_change_a_token(num_rows: int) -> None:
    rng = np.random.default_rng(5)
    count = 256
    logits = rng.normal(size=(count, V)).astype(np.float32) * 2
    columns = {
        "temperature": rng.choice([0.7, 1.0, 3.0], count),
        "top_k": rng.choice([0, 20, 100], count),
        "top_p": rng.choice([0.5, 0.9, 1.0], count),
        "min_p": rng.choice([0, 0.01], count),
        "seeds": rng.integers(0, 2**32, count),
        "positions": rng.integers(0, 10**6, count),
    }
    together = np.asarray(run(logits, sampling_rows(count, **columns))[0].tokens)
    order = rng.permutation(count)
    for start in range(0, 16 * num_rows, num_rows):
        rows = order[start : start + num_rows]
        batch = sampling_rows(num_rows, **{name: values[rows] for name, values in columns.items()})
        np.testing.assert_array_equal(run(logits[rows], batch)[0].tokens, together[rows])
        # Equal bit for bit, not merely almost always the same token.
        backwards = weights_of(logits[rows[::-1]], flipped(batch))[::-1]
        np.testing.assert_array_equal(weights_of(logits[rows], batch), backwards)


def flipped(batch: SamplingBatch) -> SamplingBatch:
    return jax.tree.map(lambda x: x[::-1] if x.ndim else x, batch)


def test_seed_and_position_each_change_the_tokens_and_repeat_them() -> None:
    logits = np.zeros(V, np.float32)
    first, again, other = (draws(logits, 256, seeds=seed) for seed in (1, 1, 2**32 - 1))
    np.testing.assert_array_equal(first, again)
    # Two independent draws from 200 tokens agree once in 200 times.
    assert (first == other).mean() < 0.05
    assert (first[1:] == first[:-1]).mean() < 0.05


# Log-probabilities


def test_other_tokens_are_compared_only_for_requests_that_want_them() -> None:
    logits = np.random.default_rng(0).normal(size=(R, V))
    (without, _), (output, _) = (run(logits, sampling_rows(R, any_logprobs=1, any_top_logprobs=x)) for x in (0, 1))
    assert not without.top_ids.any()
    np.testing.assert_array_equal(without.logprobs, output.logprobs)
    np.testing.assert_array_equal(output.top_ids[:, 0], logits.argmax(axis=1))


def test_a_vocabulary_smaller_than_the_number_of_logprobs_fills_up_with_tokens_that_do_not_exist() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    logprobs, ranks, scale = raw_logprobs.raw_logprobs(logits, jnp.array([2]))
    top_ids, top_logprobs = raw_logprobs.likeliest(logits, scale, max_logprobs=5)
    assert top_ids.tolist() == [[1, 2, 0, 3, 3]]
    assert ranks.tolist() == [2]
    np.testing.assert_allclose(np.exp(np.r_[logprobs, top_logprobs[0]]), [0.3, 0.6, 0.3, 0.1, 0, 0], atol=1e-6)
