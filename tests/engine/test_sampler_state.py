"""The sampler's state between steps: penalties, bias, bans and masks against a loop over the history."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.sampling import sampler as sampling
from fastgen_jax.engine.sampling.state import HISTORY_PIECE, SamplerState, init_state, reset_slot
from fastgen_jax.engine.sampling.tables import SamplingTables
from fastgen_jax.scheduling.request import SamplingParams
from tests import shape_checks
from tests.engine.sampling_rig import TOP, R, S, V, batch_of, program, run, sampling_rows, views_of

# Penalties, bias, bans


def penalised(logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams) -> np.ndarray:
    """The definition, one token at a time."""
    logits = logits.astype(np.float64)
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias:
        logits[token] += bias
    return logits


def admitted(
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    state: SamplerState,
    *,
    slot: int,
    tables: SamplingTables,
) -> SamplerState:
    update = tables.admit(slot, params, eos_token_ids=(2,), seed=9, num_prompt_tokens=len(prompt))
    if not update:
        return state
    logit_bias: Any = params.logit_bias
    return reset_slot(state, slot, prompt_ids=prompt, output_ids=output, logit_bias=logit_bias)


PARAMS = [
    SamplingParams(do_sample=False, repetition_penalty=1.7),
    SamplingParams(do_sample=False, presence_penalty=1.1),
    SamplingParams(do_sample=False, frequency_penalty=0.4),
    SamplingParams(do_sample=False, logit_bias={3: 2.5, 190: -100}),
    SamplingParams(do_sample=False),
    SamplingParams(do_sample=False, repetition_penalty=0.5, presence_penalty=-2, frequency_penalty=0.3, logit_bias={9: 1}),
]


def test_greedy_continuations_with_penalties_and_bias_agree_with_a_loop_over_the_history() -> None:
    rng = np.random.default_rng(2)
    tables, state = SamplingTables(S, V), init_state(S, V)
    slots = np.array([6, 1, 0, 7, 3, 2], np.int32)
    prompts = [rng.integers(0, V, 30).tolist() for _ in PARAMS]
    outputs: list[list[int]] = [[] for _ in PARAMS]
    base = (rng.normal(size=V) * 0.7).astype(np.float32)  # close to one another, so that penalties decide
    for params, prompt, slot in zip(PARAMS, prompts, slots, strict=True):
        state = admitted(params, prompt, [], state, slot=int(slot), tables=tables)
    for step in range(12):
        logits = np.tile(base, (R, 1)) + (rng.normal(size=(R, V)) * 0.3).astype(np.float32)
        views = views_of(R)
        ones = np.ones(len(PARAMS), np.int32)
        tables.fill(views, slots=slots, positions=30 + step * ones, writes_token=ones, targets={})
        output, state = run(logits, batch_of(views), state)
        for row, params in enumerate(PARAMS):
            expected = int(penalised(logits[row], prompts[row], outputs[row], params).argmax())
            assert int(output.tokens[row]) == expected
            outputs[row].append(expected)
        np.testing.assert_array_equal(state.last_tokens[slots], output.tokens[: len(PARAMS)])
    assert max(map(len, map(set, outputs))) > 3

    # A sequence that is preempted now and gets another slot is penalized for what it generated before.
    resumed = init_state(S, V)
    row = 5
    resumed = admitted(PARAMS[row], prompts[row], outputs[row], resumed, slot=4, tables=tables)
    np.testing.assert_array_equal(resumed.token_counts[4], state.token_counts[slots[row]])


def test_long_histories_are_counted_completely_and_a_slot_drops_its_earlier_sequence() -> None:
    rng = np.random.default_rng(4)
    prompt, output = (rng.integers(0, V, size).tolist() for size in (2 * HISTORY_PIECE + 5, HISTORY_PIECE + 1))
    state = reset_slot(init_state(S, V), 3, prompt_ids=[1] * 9, output_ids=[199] * 9, logit_bias=((5, 1.0),))
    state = reset_slot(state, 3, prompt_ids=prompt, output_ids=output, logit_bias=())
    expected = 2 * np.bincount(output, minlength=V) + (np.bincount(prompt, minlength=V) > 0)
    np.testing.assert_array_equal(state.token_counts[3], expected)
    assert not np.asarray(state.token_counts)[np.arange(S) != 3].any()
    assert (np.asarray(state.bias_ids[3]) == V).all()


def test_a_count_stops_at_the_largest_int16_instead_of_wrapping() -> None:
    state = reset_slot(init_state(S, V), 0, prompt_ids=[5], output_ids=[5] * 20_000 + [6] * 16_382, logit_bias=())
    assert state.token_counts[0, 5:7].tolist() == [2**15 - 1, 2 * 16_382]
    logits = np.zeros((R, V), np.float32)
    columns = {"slots": np.r_[0, [S] * (R - 1)], "writes_token": 1, "frequency_penalty": 1e-9, "any_sampling": 0}
    for token, expected in ((5, 2**15 - 1), (6, 2**15 - 2), (6, 2**15 - 2)):
        logits[:] = 0
        logits[:, token] = 1
        _, state = run(logits, sampling_rows(R, temperature=0, **columns), state)
        assert int(state.token_counts[0, token]) == expected


def test_a_row_without_bias_ignores_the_bias_of_the_earlier_sequence_in_its_slot() -> None:
    tables, state = SamplingTables(S, V), init_state(S, V)
    biased, plain = SamplingParams(do_sample=False, logit_bias={8: 50}), SamplingParams(do_sample=False)
    state = admitted(biased, [1], [], state, slot=0, tables=tables)
    state = admitted(biased, [1], [], state, slot=1, tables=tables)
    state = admitted(plain, [1], [], state, slot=0, tables=tables)
    views = views_of(R)
    ones = np.ones(2, np.int32)
    tables.fill(views, slots=np.array([0, 1], np.int32), positions=ones, writes_token=ones, targets={})
    logits = np.zeros((R, V), np.float32)
    logits[:, 4] = 1
    assert run(logits, batch_of(views), state)[0].tokens[:2].tolist() == [4, 8]


@pytest.mark.parametrize("temperature", [0, 1])
def test_stop_and_end_tokens_are_banned_until_min_new_tokens_are_generated(temperature: int) -> None:
    tables = SamplingTables(S, V)
    params = SamplingParams(temperature=temperature, min_new_tokens=3, stop_token_ids=(5, 199))
    tables.admit(0, params, eos_token_ids=(2,), seed=1, num_prompt_tokens=10)
    tables.admit(1, params, eos_token_ids=(2,), seed=1, num_prompt_tokens=100)  # always banned
    for position in range(10, 15):
        views = views_of(R)
        positions, ones = np.array([position, 100], np.int32), np.ones(2, np.int32)
        tables.fill(views, slots=ones.cumsum() - 1, positions=positions, writes_token=ones, targets={})
        logits = np.full((R, V), -50, np.float32)
        logits[:, [2, 5, 199]] = [30, 25, 20]
        logits[:, 77] = 0
        assert run(logits, batch_of(views))[0].tokens[:2].tolist() == [77 if position < 13 else 2, 77]


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits_whatever_changes_the_token() -> None:
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=(R, V)) * 4).astype(np.float32)
    logits[3, 10:100] = -np.inf
    logits[4] = np.round(logits[4])  # ties
    tables, state = SamplingTables(S, V), init_state(S, V)
    params = SamplingParams(temperature=3, top_k=30, repetition_penalty=1.5, logit_bias={4: 3}, logprobs=5)
    for slot in range(R - 1):
        state = admitted(params, [1, 2], [3], state, slot=slot, tables=tables)
    views = views_of(R)
    slots = np.arange(R - 1, dtype=np.int32)
    writes = np.array([1] * 5 + [0] * 2, np.int32)
    tables.fill(views, slots=slots, positions=slots + 9, writes_token=writes, targets={5: 180, 6: 0})
    before = np.asarray(state.last_tokens)
    output, state = run(logits, batch_of(views), state)
    tokens = np.asarray(output.tokens)
    assert tokens[5:7].tolist() == [180, 0]
    exact = logits.astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row in range(R - 1):
        np.testing.assert_allclose(output.logprobs[row], expected[row, tokens[row]], atol=1e-5)
        assert output.ranks[row] == 1 + (logits[row] > logits[row, tokens[row]]).sum()
        order = np.lexsort((np.arange(V), -logits[row]))[:TOP]
        np.testing.assert_array_equal(output.top_ids[row], order)
        np.testing.assert_allclose(output.top_logprobs[row], expected[row, order], atol=1e-5)
    # Rows that report a target sample nothing, so they do not change the state.
    np.testing.assert_array_equal(state.last_tokens, np.r_[tokens[:5], before[5:]])
    assert not np.asarray(state.token_counts[5:7, 180]).any()


# State


def test_a_row_that_writes_no_token_leaves_its_slot_as_it_is() -> None:
    logits = np.zeros((R, V), np.float32)
    logits[:, 9] = 1
    columns = {"slots": np.arange(R), "writes_token": np.arange(R) % 2, "presence_penalty": 0.1, "any_penalties": 1}
    _, state = run(logits, sampling_rows(R, temperature=0, **columns))
    np.testing.assert_array_equal(state.last_tokens, [0, 9] * (R // 2))
    np.testing.assert_array_equal(state.token_counts[:, 9], [0, 2] * (R // 2))


def test_unused_rows_and_unused_slots_leave_the_state_as_it_is() -> None:
    state = init_state(S, V)
    before = jax.tree.map(np.array, state)
    batch = sampling_rows(R, writes_token=1, frequency_penalty=1, any_penalties=1, any_bias=1, has_bias=1, any_bans=1)
    _, state = run(np.random.default_rng(0).normal(size=(R, V)), batch, state)
    jax.tree.map(np.testing.assert_array_equal, before, state)


@pytest.mark.parametrize("num_rows", [1, R])
def test_a_step_updates_the_state_in_place_and_never_copies_the_counts(num_rows: int) -> None:
    memory = program(num_rows).memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(init_state(S, V)))
    text = program(num_rows).as_text()
    assert f"s16[{S},{V}]" in text
    assert re.findall(rf"= s16\[{S},{V}\]\S* copy.*", text) == []


def test_logits_of_another_vocabulary_or_dtype_are_refused_with_the_remedy() -> None:
    batch = batch_of(views_of(R))
    for logits in (jnp.zeros((R, V + 1)), jnp.zeros((R, V), jnp.bfloat16), jnp.zeros(V)):
        with shape_checks.unchecked(), pytest.raises(ValueError, match=r"float32\[R, 200\].*convert"):
            sampling.sample(logits, init_state(S, V), batch, max_logprobs=TOP)
