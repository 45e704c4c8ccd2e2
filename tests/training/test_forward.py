"""The trainable forward pass against the engine, bit for bit where it promises that, and against plain JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, SamplingParams
from fastgen_jax.models.dense import dense_forward
from fastgen_jax.training import DEFAULTS, Options, logprobs, options_of, pack, padded_batch
from pallas_kernels import native
from tests.models.parity import expected, load, variants
from tests.tiny import drain, random_params, tiny_engine, tiny_model, tokens_of

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(3, 60, length).tolist() for length in (9, 1, 5, 12)]
PROMPTS = [2, 1, 4, 1]
ROUNDING = 2e-5  # two float32 programs that sum in different orders

PROGRAM = jax.jit(logprobs, static_argnames=("config", "options", "temperature"))


def assert_same_bits(got, want) -> None:
    # The logarithm of older versions of XLA rounds differently in full vectors and in the remainder.
    np.testing.assert_allclose(got, want, rtol=0, atol=0.0 if jax.__version_info__ >= (0, 10) else 1e-6)


def dense_logprobs(params, config) -> list[np.ndarray]:
    """Log-probabilities of the predicted tokens of each of SEQUENCES, by the dense forward."""
    result = []
    for tokens, prompt in zip(SEQUENCES, PROMPTS, strict=True):
        scores = jax.nn.log_softmax(dense_forward(params, jnp.asarray([tokens], jnp.int32), config=config)[0])
        result.append(np.asarray(scores)[np.arange(prompt - 1, len(tokens) - 1), tokens[prompt:]])
    return result


def plain_loss(params, config) -> jax.Array:
    """What `loss` computes, by the dense forward and JAX's own log-softmax."""
    total = jnp.float32(0)
    for tokens, prompt in zip(SEQUENCES, PROMPTS, strict=True):
        scores = jax.nn.log_softmax(dense_forward(params, jnp.asarray([tokens], jnp.int32), config=config)[0])
        chosen = jnp.take_along_axis(scores[:-1], jnp.asarray(tokens[1:], jnp.int32)[:, None], axis=1)[:, 0]
        total = total - jnp.sum(chosen[prompt - 1 :] * jnp.arange(len(tokens) - prompt, dtype=jnp.float32))
    return total


def loss(params, batch, config, options=DEFAULTS) -> jax.Array:
    weights = jnp.concatenate([jnp.arange(len(s) - p, dtype=jnp.float32) for s, p in zip(SEQUENCES, PROMPTS, strict=True)])
    weights = jnp.pad(weights, (0, batch.targets.shape[0] - len(weights)))
    return -jnp.sum(logprobs(params, batch, config=config, options=options) * weights)


def assert_alike(got, want, tolerance=ROUNDING) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(b).max() + 1e-3)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_a_batch_has_the_tokens_after_each_prompt_as_targets():
    batch = pack(SEQUENCES, PROMPTS, num_tokens=32, num_rows=24, num_sequences=5)
    rows, used = np.asarray(batch.ragged.sample_rows), np.asarray(batch.is_used)
    tokens = np.asarray(batch.ragged.token_ids)
    answers = [token for s, p in zip(SEQUENCES, PROMPTS, strict=True) for token in s[p:]]
    assert used.sum() == len(answers)
    np.testing.assert_array_equal(np.asarray(batch.targets)[used], answers)
    np.testing.assert_array_equal(tokens[rows[used] + 1], answers)
    np.testing.assert_array_equal(np.asarray(batch.sums(batch.is_used.astype(jnp.float32))), [7, 0, 1, 11, 0])
    with pytest.raises(ValueError, match="num_tokens is 8, but these sequences need 27"):
        pack(SEQUENCES, PROMPTS, num_tokens=8)
    with pytest.raises(ValueError, match=r"prompt_lengths\[0\] is 10, but sequences\[0\] has 9 tokens"):
        pack(SEQUENCES, [10, 1, 1, 1])


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_logprobs_equal_those_of_a_rollout_and_of_its_score_bit_for_bit():
    params, config = tiny_model(stack_layers=True)
    engine = tiny_engine()
    sampled = SamplingParams(max_new_tokens=20, seed=3, temperature=0.7, logprobs=0, ignore_eos=True)
    for i, tokens in enumerate(SEQUENCES):
        engine.add(tokens, sampled, request_id=str(i))
    outputs = drain(engine)
    whole = [[*tokens, *tokens_of(outputs[str(i)])] for i, tokens in enumerate(SEQUENCES)]
    entries = [entry for i in range(len(whole)) for output in outputs[str(i)] for entry in output.logprobs]
    batch = pack(whole, list(map(len, SEQUENCES)), num_tokens=128, num_rows=96)

    raw, processed = (
        np.asarray(PROGRAM(params, batch, config=config, options=Options(head_rows=30), temperature=temperature))
        for temperature in (1.0, 0.7)
    )
    assert_same_bits(raw[: len(entries)], [entry.logprob for entry in entries])
    assert_same_bits(processed[: len(entries)], [entry.processed_logprob for entry in entries])
    (scores,) = engine.score([whole[3]], start=len(SEQUENCES[3]))
    assert_same_bits(scores.logprobs, raw[len(entries) - 20 : len(entries)])


@pytest.mark.slow
@pytest.mark.parametrize("options", [Options(), Options(remat=False, attention="reference")], ids=["default", "plain"])
def test_values_and_gradients_are_those_of_the_dense_forward(options):
    _, config = tiny_model(stack_layers=True)
    params = random_params(config)
    batch = pack(SEQUENCES, PROMPTS, num_tokens=40, num_rows=24, num_sequences=6)
    values = jax.jit(partial(logprobs, config=config, options=options))(params, batch)
    want = np.concatenate(dense_logprobs(params, config))
    np.testing.assert_allclose(np.asarray(values)[: len(want)], want, atol=ROUNDING)
    assert not np.asarray(values)[len(want) :].any()
    got = jax.jit(jax.grad(partial(loss, config=config, options=options)))(params, batch)
    assert_alike(got, jax.jit(jax.grad(partial(plain_loss, config=config)))(params), 1e-4)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_a_sequence_has_the_same_bits_alone_among_others_and_padded():
    _, config = tiny_model(stack_layers=True)
    params = random_params(config)
    sizes = {"num_tokens": 40, "num_rows": 32, "num_sequences": 6}
    together = np.asarray(PROGRAM(params, pack(SEQUENCES, **sizes), config=config))
    padded = np.zeros((4, 12), np.int32)
    for row, tokens in zip(padded, SEQUENCES, strict=True):
        row[: len(tokens)] = tokens
    in_rows = np.asarray(PROGRAM(params, padded_batch(jnp.asarray(padded)), config=config)).reshape(4, 11)
    start = 0
    for tokens, row in zip(SEQUENCES, in_rows, strict=True):
        part = together[start : start + len(tokens) - 1]
        start += len(part)
        alone = np.asarray(PROGRAM(params, pack([tokens], **sizes), config=config))
        assert_same_bits(alone[: len(part)], part)
        assert_same_bits(row[: len(part)], part)


EXPERTS_AND_LATENTS = ["mixtral", "qwen2_moe", "deepseek_v3"]
SHARED_KEYS = ["gemma3n", "gemma4"]


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("family", ["llama", *EXPERTS_AND_LATENTS])
def test_options_of_an_engine_have_its_number_formats(family):
    params, config = load(family, "default", stack_layers=True)
    shape: dict[str, Any] = {"token_budget": 16, "budget_ladder": (), "num_blocks": 24, "block_size": 4}
    engine = Engine(params, config, EngineConfig(dtype="bfloat16", kv_dtype="bfloat16", **shape))
    params, batch = jax.tree.map(jnp.asarray, params), pack(SEQUENCES[:1])
    (scores,) = engine.score(SEQUENCES[:1])
    assert_same_bits(PROGRAM(params, batch, config=config, options=options_of(engine)), scores.logprobs)
    assert np.abs(PROGRAM(params, batch, config=config) - scores.logprobs).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [*EXPERTS_AND_LATENTS, *SHARED_KEYS])
def test_gradients_of_experts_latents_and_shared_keys_are_those_of_the_dense_forward(family):
    params, config = load(family, "default", stack_layers=True)
    params, batch = jax.tree.map(jnp.asarray, params), pack(SEQUENCES, PROMPTS)
    got = jax.jit(jax.grad(partial(loss, config=config)))(params, batch)
    assert_alike(got, jax.jit(jax.grad(partial(plain_loss, config=config)))(params), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({family for family, _ in variants()}))
def test_every_family_has_the_numbers_of_its_engine(family):
    variant = next(variant for name, variant in variants() if name == family)
    params, config = load(family, variant, stack_layers=True)
    engine = Engine(
        params, config, EngineConfig(dtype="float32", token_budget=16, budget_ladder=(), num_blocks=24, block_size=4)
    )
    tokens, _, _ = expected(family, variant)
    tokens = tokens[:20].tolist()
    (scores,) = engine.score([tokens], start=1)
    refusal = None
    if config.window_chunks:
        refusal = "attends within chunks of 16 tokens, which is not supported without a KV cache"
    elif config.state is not None:
        refusal = "it keeps a state in the slot"
    elif config.kv_sources:
        refusal = "whose layers read the keys of others, cannot run without a KV cache"
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            PROGRAM(jax.tree.map(jnp.asarray, params), pack([tokens]), config=config)
        return
    values = np.asarray(PROGRAM(jax.tree.map(jnp.asarray, params), pack([tokens]), config=config))
    if config.altup is not None:  # XLA sums over the streams in an order that depends on the number of tokens
        np.testing.assert_allclose(values, scores.logprobs, atol=ROUNDING)
        return
    assert_same_bits(values, np.float32(scores.logprobs))
