"""What the sampler does on a TPU gives what it does elsewhere, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.sampling import lanes
from fastgen_jax.engine.sampling import sampler as sampling
from fastgen_jax.engine.sampling.state import init_state
from tests.engine.sampling_rig import TOP, R, S, batch_of, views_of

SIZES = [300, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 31, 128, 200))]


def random_batch(rng: np.random.Generator, vocab_size: int, **flags: int) -> Any:
    views = views_of(R, vocab_size)
    views["slots"][...] = rng.permutation(S)[:R]
    views["positions"][...] = rng.integers(0, 50, R)
    views["seeds"][...] = rng.integers(0, 2**31, R)
    views["temperature"][...] = rng.choice([0, 0.5, 1, 2], R)
    views["top_k"][...] = rng.choice([0, 1, 5, 40], R)
    views["top_p"][...] = rng.choice([1, 0.9, 0.3], R)
    views["min_p"][...] = rng.choice([0, 0.1], R)
    for name in ("presence_penalty", "frequency_penalty"):
        views[name][...] = rng.choice([0, 0.5], R)
    views["repetition_penalty"][...] = rng.choice([1, 1.3], R)
    views["has_bias"][...] = rng.integers(0, 2, R)
    views["has_mask"][...] = rng.integers(0, 2, R)
    views["stop_ids"][...] = rng.integers(0, vocab_size + 1, views["stop_ids"].shape)
    views["ban_before"][...] = rng.integers(0, 50, R)
    for name, value in flags.items():
        views[name][...] = value
    return batch_of(views)


def random_state(rng: np.random.Generator, vocab_size: int) -> Any:
    state = init_state(S, vocab_size)
    ids, values = np.array(state.bias_ids), np.array(state.bias_values)
    for row in range(S):
        some = rng.permutation(vocab_size)[: rng.integers(0, 8)]
        ids[row, : len(some)], values[row, : len(some)] = some, rng.standard_normal(len(some))
    return replace(
        state,
        token_counts=jnp.asarray(rng.integers(0, 7, state.token_counts.shape), state.token_counts.dtype),
        token_masks=jnp.asarray(rng.integers(-(2**31), 2**31, state.token_masks.shape), jnp.int32),
        bias_ids=jnp.asarray(ids),
        bias_values=jnp.asarray(values),
    )


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_sampler_of_a_tpu_gives_what_that_of_a_gpu_does(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, results = np.random.default_rng(vocab_size), []
    logits = jnp.asarray(np.round(3 * rng.standard_normal((R, vocab_size)), 1), jnp.float32)  # with ties
    names = ("any_sampling", "any_penalties", "any_bias", "any_bans", "any_masks", "any_logprobs", "any_top_logprobs")
    batches = [random_batch(rng, vocab_size, **dict.fromkeys(names[:count], 1)) for count in range(len(names) + 1)]
    batches.append(random_batch(rng, vocab_size, any_bans=1, any_bias=1))
    state = random_state(rng, vocab_size)
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr("pallas_kernels.gpu_target.platform", lambda known=platform: known)
        program = jax.jit(lambda *arguments: sampling.sample(*arguments, max_logprobs=TOP))
        # JAX keeps the traced branches for each setting of this kind, but does not know that they depend on the platform.
        with jax.default_matmul_precision({"gpu": "high", "tpu": "highest"}[platform]):
            results.append([program(logits, state, batch) for batch in batches])
    for of_gpu, of_tpu in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(of_gpu, of_tpu)


@pytest.mark.parametrize("count", [1, 32, 100, 128, 300])
def test_bits_are_those_of_the_words(count: int) -> None:
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, -(-count // 32)), np.int32)
    wanted = [[words[row, i // 32] >> (i % 32) & 1 for i in range(count)] for row in range(3)]
    np.testing.assert_array_equal(lanes.bits(jnp.asarray(words), count), wanted)


def test_a_row_with_nan_yields_an_index_of_the_row() -> None:
    x = jnp.asarray([[1, jnp.nan, 2], [3, 3, 1]], jnp.float32)
    np.testing.assert_array_equal(lanes.argmax(x), [2, 0])


def test_weights_that_do_not_sum_to_enough_end_at_the_last_index() -> None:
    weights = jnp.asarray([[0, 2, 0, 3, 0], [1, 1, 1, 1, 1]], jnp.int32)
    for enough, wanted in (([1, 1], [1, 0]), ([2, 3], [1, 2]), ([3, 5], [3, 4]), ([6, 9], [4, 4])):
        np.testing.assert_array_equal(lanes.first_reaching(weights, jnp.asarray(enough)), wanted)
