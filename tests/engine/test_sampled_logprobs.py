"""Processed log-probabilities, with which tokens are drawn, against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen_jax import SamplingParams
from fastgen_jax.engine.sampling.state import init_state, reset_slot, set_masks
from tests.engine.sampling_rig import R, S, V, batch_of, run, sampling_rows, views_of
from tests.engine.test_sampling import kept_tokens, softmax
from tests.tiny import drain, greedy, tiny_engine

# Differences of logits of up to 100 by a temperature of 0.3, rounded to float32.
TOLERANCE = 2e-5


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_the_probability_is_that_after_everything_that_precedes_the_draw(seed, given):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(R, V))).astype(np.float32)
    adjusted = logits.astype(np.float64)
    state, views = init_state(S, V), views_of(R)
    settings = {
        "temperature": rng.choice([0.3, 1.0, 2.5], R),
        "top_k": rng.choice([0, 3, 50], R),
        "top_p": rng.choice([0.5, 0.9, 1.0], R),
        "min_p": rng.choice([0.0, 0.1], R),
    }
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
    for name, value in {**settings, **penalties}.items():
        views[name][...] = value
    views["slots"][...], views["seeds"][...] = np.arange(R), rng.integers(0, 2**32, R)
    for flag in ("any_sampling", "any_penalties", "any_bias", "any_masks", "any_bans", "any_logprobs", "any_top_logprobs"):
        views[flag][...] = 1
    if given:
        views["targets"][...] = rng.integers(0, V, R)
    views["has_bias"][...] = views["has_mask"][...] = 1
    views["ban_before"][...], views["stop_ids"][:, 0] = 100, 11
    for row in range(R):
        prompt, output = rng.integers(0, V, 9).tolist(), rng.integers(0, V, 30).tolist()
        bias = {int(i): float(x) for i, x in zip(rng.integers(0, V, 5), rng.normal(size=5) * 5, strict=True)}
        allowed = rng.random(V) < 0.7
        state = reset_slot(state, row, prompt_ids=prompt, output_ids=output, logit_bias=tuple(bias.items()))
        bits = np.zeros(-(-V // 32) * 32, np.uint8)
        bits[:V] = allowed
        state = set_masks(state, [row], np.packbits(bits, bitorder="little").view(np.int32)[None])
        x = adjusted[row]
        for token in {*prompt, *output}:
            x[token] = x[token] / 1.3 if x[token] > 0 else x[token] * 1.3
        for token in set(output):
            x[token] -= 0.7 + 0.4 * output.count(token)
        for token, value in bias.items():
            x[token] += value
        x[11] = -np.inf
        x[~allowed] = -np.inf
    output, _ = run(logits, batch_of(views), state)
    tokens, logprobs = np.asarray(output.tokens), np.asarray(output.processed_logprobs)
    assert not given or (tokens == views["targets"]).all()
    for row in range(R):
        temperature = settings["temperature"][row]
        kept = kept_tokens(
            adjusted[row],
            temperature=temperature,
            top_k=int(settings["top_k"][row]),
            top_p=settings["top_p"][row],
            min_p=settings["min_p"][row],
        )
        shares = dict(zip(kept, softmax(adjusted[row][kept] / temperature), strict=True))
        share = shares.get(int(tokens[row]), 0.0)
        assert share > 0 or given
        assert logprobs[row] == pytest.approx(np.log(share) if share else -np.inf, abs=TOLERANCE)
        everything = np.exp(adjusted[row] / temperature - np.max(adjusted[row] / temperature))
        mass = everything[kept].sum() / everything.sum()
        assert np.asarray(output.log_kept_masses)[row] == pytest.approx(np.log(mass), abs=TOLERANCE)


def test_without_any_limit_processed_and_raw_log_probabilities_are_equal_to_the_last_bit():
    logits = (6 * np.random.default_rng(3).normal(size=(R, V))).astype(np.float32)
    output, _ = run(logits, sampling_rows(R, any_logprobs=1, seeds=np.arange(R)))
    np.testing.assert_array_equal(output.processed_logprobs, output.logprobs)
    assert (np.asarray(output.log_kept_masses) == 0).all()
    targets = np.argsort(logits, axis=1)[:, 0]  # the least likely: far below the precision of the weights to draw from
    output, _ = run(logits, sampling_rows(R, any_logprobs=1, targets=targets))
    np.testing.assert_array_equal(output.processed_logprobs, output.logprobs)


def test_all_numbers_are_the_same_beside_a_row_with_a_limit():
    logits = (4 * np.random.default_rng(5).normal(size=(R, V))).astype(np.float32)
    settings = {"any_logprobs": 1, "any_top_logprobs": 1, "seeds": np.arange(R), "positions": np.arange(R) + 3}
    temperature = np.array([1, 0, 0.4, 1, 2, 0, 1, 1], np.float32)
    targets = np.where(np.arange(R) % 3, V, 7)
    alone, _ = run(logits, sampling_rows(R, temperature=temperature, targets=targets, **settings))
    top_p = np.ones(R, np.float32)
    top_p[-1] = 0.5
    beside, _ = run(logits, sampling_rows(R, temperature=temperature, targets=targets, top_p=top_p, **settings))
    for name in ("tokens", "processed_logprobs", "log_kept_masses", "logprobs", "ranks", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(alone, name)[:-1], getattr(beside, name)[:-1], err_msg=name)


def test_greedy_rows_are_certain_in_a_batch_that_samples():
    logits = np.random.default_rng(1).normal(size=(R, V)).astype(np.float32)
    batch = sampling_rows(R, temperature=np.where(np.arange(R) % 2, 0, 1), any_logprobs=1)
    logprobs = np.asarray(run(logits, batch)[0].processed_logprobs)
    assert (logprobs[1::2] == 0).all()
    assert (logprobs[::2] < 0).all()
    assert (np.asarray(run(logits, batch_of(views_of(R)))[0].processed_logprobs) == 0).all()


def test_requests_with_logprobs_get_both_log_probabilities_and_prompts_one():
    engine = tiny_engine()
    plain = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=0, prompt_logprobs=0, seed=3)
    sharp = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=0, seed=3, temperature=0.2)
    ids = [engine.add([5, 6, 7], params) for params in (plain, sharp, greedy(6, logprobs=0))]
    outputs = drain(engine)
    plain, sharp, likeliest = ([entry for output in outputs[i] for entry in output.logprobs] for i in ids)
    for entry in plain:  # nothing changes the logits before the draw
        assert entry.processed_logprob == pytest.approx(entry.logprob, abs=TOLERANCE)
    assert any(abs(entry.processed_logprob - entry.logprob) > 0.1 for entry in sharp)
    assert [entry.processed_logprob for entry in likeliest] == [0.0] * 6
    assert [entry.processed_logprob for entry in outputs[ids[0]][0].prompt_logprobs] == [None, None]
