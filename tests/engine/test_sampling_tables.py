"""Parameters of requests, gathered into the packed array."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen_jax.engine.sampling.tables import SamplingBatch, SamplingTables, sampling_fields, validate
from fastgen_jax.scheduling.request import SamplingParams

V, S, R = 100, 4, 6


def cleared(num_rows: int = R) -> dict[str, np.ndarray]:
    views = {name: np.full(shape, 77, dtype) for name, shape, dtype in sampling_fields(num_rows)}
    SamplingTables.clear(views, max_num_seqs=S, vocab_size=V)
    return views


def filled(tables: SamplingTables, slots, *, positions=None, writes=None, targets=None) -> dict[str, np.ndarray]:
    views = cleared()
    tables.fill(
        views,
        slots=np.array(slots, np.int32),
        positions=np.array(positions if positions is not None else [9] * len(slots), np.int32),
        writes_token=np.array(writes if writes is not None else [1] * len(slots), np.int32),
        targets=targets or {},
    )
    return views


def admit(tables: SamplingTables, slot: int, *, eos=(2,), seed=0, num_prompt_tokens=5, **params) -> bool:
    return tables.admit(slot, SamplingParams(**params), eos_token_ids=eos, seed=seed, num_prompt_tokens=num_prompt_tokens)


def test_the_packed_fields_are_the_fields_of_the_batch() -> None:
    assert {name for name, _, _ in sampling_fields(1)} == set(SamplingBatch.__dataclass_fields__)


def test_parameters_reach_the_rows_of_their_sequences_in_any_order() -> None:
    tables = SamplingTables(S, V)
    admit(tables, 3, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=2**32 - 1)
    admit(tables, 0, presence_penalty=1, frequency_penalty=-0.5, repetition_penalty=1.5)
    views = filled(tables, [3, 0, 3], positions=[8, 9, 10])
    expected = {
        "slots": [3, 0, 3],
        "positions": [8, 9, 10],
        "writes_token": [1, 1, 1],
        "temperature": [0.5, 1, 0.5],
        "top_k": [7, 0, 7],
        "top_p": [0.25, 1, 0.25],
        "min_p": [0.125, 0, 0.125],
        "presence_penalty": [0, 1, 0],
        "frequency_penalty": [0, -0.5, 0],
        "repetition_penalty": [1, 1.5, 1],
        "seeds": [2**32 - 1, 0, 2**32 - 1],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(views[name][:3], values, err_msg=name)
    empty = cleared()
    for name, view in views.items():
        if view.ndim:
            np.testing.assert_array_equal(view[3:], empty[name][3:], err_msg=name)


@pytest.mark.parametrize(
    ("params", "flags"),
    [
        ({"do_sample": False}, set()),
        ({"temperature": 0}, set()),
        ({}, {"any_sampling"}),
        ({"do_sample": False, "presence_penalty": 1}, {"any_penalties"}),
        ({"do_sample": False, "frequency_penalty": 1}, {"any_penalties"}),
        ({"do_sample": False, "repetition_penalty": 2}, {"any_penalties"}),
        ({"do_sample": False, "logit_bias": {3: 1}}, {"any_bias"}),
        ({"do_sample": False, "logprobs": 0}, {"any_logprobs"}),
        ({"do_sample": False, "logprobs": 1}, {"any_logprobs", "any_top_logprobs"}),
        ({"do_sample": False, "prompt_logprobs": 2}, {"any_top_logprobs"}),  # where rows have targets
        ({"do_sample": False, "min_new_tokens": 5}, {"any_bans"}),
        ({"do_sample": False, "min_new_tokens": 4}, set()),  # at position 9, the fifth new one
        ({"do_sample": False, "min_new_tokens": 5, "ignore_eos": True}, set()),
    ],
)
def test_a_flag_is_set_only_by_a_row_that_needs_it(params, flags) -> None:
    tables = SamplingTables(S, V)
    update = admit(tables, 1, **params)
    assert update == bool(flags & {"any_penalties", "any_bias"})
    admit(tables, 2, do_sample=False)
    for slots, expected in (([2], set()), ([2, 1], flags)):
        views = filled(tables, slots)
        assert {name for name, view in views.items() if not view.ndim and view} == expected
    admit(tables, 1, do_sample=False)  # the next sequence in this slot inherits nothing
    views = filled(tables, [1])
    empty = cleared()
    for name in set(views) - {"slots", "positions", "writes_token"}:
        np.testing.assert_array_equal(views[name], empty[name], err_msg=name)


def test_a_row_that_samples_nothing_is_neutral_except_for_its_target() -> None:
    tables = SamplingTables(S, V)
    admit(tables, 0, repetition_penalty=2, min_new_tokens=50, logprobs=3)
    views = filled(tables, [0, 0], writes=[0, 0], targets={1: 42})
    assert views["slots"].tolist() == [S] * R
    assert views["targets"].tolist() == [V, 42, V, V, V, V]
    assert {name for name, view in views.items() if not view.ndim and view} == {"any_logprobs", "any_top_logprobs"}


def test_stop_and_end_tokens_are_listed_while_they_are_banned() -> None:
    tables = SamplingTables(S, V)
    admit(tables, 0, min_new_tokens=9, stop_token_ids=(7, 30), eos=(2, 7))
    views = filled(tables, [0])
    assert views["ban_before"][0] == 14
    assert views["stop_ids"][0].tolist() == [2, 7, 30] + [V] * (views["stop_ids"].shape[1] - 3)


def test_a_temperature_out_of_float32s_range_is_neither_greedy_nor_infinite() -> None:
    tables = SamplingTables(S, V)
    admit(tables, 0, temperature=1e-300)
    admit(tables, 1, temperature=1e300)
    low, high = filled(tables, [0, 1])["temperature"][:2]
    assert 0 < low < high < np.inf


def test_a_top_k_of_the_vocabulary_or_more_is_off() -> None:
    tables = SamplingTables(S, V)
    for slot, top_k in enumerate((V - 1, V, 10**12)):
        admit(tables, slot, top_k=top_k)
    assert filled(tables, [0, 1, 2])["top_k"][:3].tolist() == [V - 1, 0, 0]


def test_tokens_outside_the_vocabulary_are_refused_with_the_remedy() -> None:
    validate(SamplingParams(logit_bias={V - 1: 1}, stop_token_ids=(V - 1,)), V)
    with pytest.raises(ValueError, match=r"logit_bias names token 100, outside the vocabulary, 0\.\.99; remove it"):
        validate(SamplingParams(logit_bias={V: 1}), V)
    with pytest.raises(ValueError, match=r"stop_token_ids names token 101.*tokenizer"):
        validate(SamplingParams(stop_token_ids=(101,)), V)


def test_more_tokens_to_ban_than_fit_are_refused_only_if_they_must_be_banned() -> None:
    eos = range(50, 75)
    validate(SamplingParams(), V, eos_token_ids=eos)
    with pytest.raises(ValueError, match=r"bans all 25 stop .* but at most 24 .*min_new_tokens=0"):
        validate(SamplingParams(min_new_tokens=1), V, eos_token_ids=eos)
