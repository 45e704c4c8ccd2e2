"""Sampling parameters and requests: which values are rejected, and with which message."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest

from fastgen_jax.scheduling import Request, SamplingParams

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1; request at least one token"),
    ({"max_new_tokens": True}, "max_new_tokens is True; it must be an int"),
    ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be an int"),
    ({"max_length": 1}, "max_length is 1; it must be at least 2"),
    ({"max_new_tokens": 3, "max_length": 9}, "max_new_tokens=3 and max_length=9 are both set; set only one of them"),
    ({"min_new_tokens": -1}, "min_new_tokens is -1; it must be at least 0"),
    ({"min_new_tokens": 4, "max_new_tokens": 3}, "lower min_new_tokens to at most 3"),
    ({"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
    ({"do_sample": None}, "do_sample is None; it must be True or False"),
    ({"stop": ""}, "stop contains ''; every stop must be a non-empty string; remove it"),
    ({"stop": ["a", ""]}, "stop contains ''"),
    ({"stop": [3]}, "stop contains 3"),
    ({"stop": None}, "stop is None; it must be a sequence; use () for none"),
    ({"stop_token_ids": list(range(1025))}, "stop_token_ids has 1025 entries but at most 1024"),
    ({"stop_token_ids": [-1]}, "stop_token_ids contains -1; token ids are ints in [0, 2147483647]"),
    ({"stop_token_ids": [True]}, "stop_token_ids contains True"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a sequence"),
    ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0; use 0 for greedy"),
    ({"temperature": math.nan}, "temperature is nan; it must be a finite number"),
    ({"temperature": math.inf}, "temperature is inf; it must be a finite number"),
    ({"temperature": False}, "temperature is False; it must be a finite number"),
    ({"top_k": -2}, "top_k is -2; it must be at least 1; use None, 0 or -1 to keep every token"),
    ({"top_k": True}, "top_k is True"),
    ({"top_p": 0}, "top_p is 0; it must be in (0, 1]"),
    ({"top_p": 1.01}, "top_p is 1.01; it must be in (0, 1]"),
    ({"min_p": -0.5}, "min_p is -0.5; it must be in [0, 1]"),
    ({"min_p": 1.5}, "min_p is 1.5; it must be in [0, 1]"),
    ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be in [-2, 2]"),
    ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5; it must be in [-2, 2]"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be in (0, 10]; use 1 for no penalty"),
    ({"repetition_penalty": 11}, "repetition_penalty is 11; it must be in (0, 10]"),
    ({"logit_bias": {3: 101}}, "logit_bias[3] is 101; it must be in [-100, 100]"),
    ({"logit_bias": {"3": 1}}, "logit_bias contains '3'; token ids are ints"),
    ({"logit_bias": {3: True}}, "logit_bias[3] is True; it must be a finite number"),
    ({"logit_bias": [3]}, "logit_bias is [3]; it must be a mapping from token id to bias"),
    ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 entries but at most 300"),
    ({"seed": -1}, "seed is -1; it must be in [0, 4294967295]; reduce it modulo 2**32"),
    ({"seed": 2**32}, "seed is 4294967296; it must be in [0, 4294967295]"),
    ({"seed": False}, "seed is False; it must be an int"),
    ({"n": 0}, "n is 0; it must be at least 1"),
    (
        {"n": 2, "do_sample": False},
        "n is 2 but greedy decoding returns the same continuation every time; use n=1",
    ),
    ({"n": 2, "temperature": 0}, "n is 2 but greedy decoding"),
    ({"logprobs": 21}, "logprobs is 21; it must be in [0, 20]; use None for no log-probabilities"),
    ({"logprobs": True}, "logprobs is True; it must be an int"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must be in [0, 20]"),
    (
        {"do_sample": False, "temperature": 0.7},
        "temperature is 0.7; remove temperature, or set do_sample=True",
    ),
    ({"do_sample": False, "top_k": 5}, "top_k is 5; remove top_k, or set do_sample=True"),
    ({"do_sample": False, "top_p": 0.5}, "top_p is 0.5; remove top_p"),
    ({"do_sample": False, "min_p": 0.5}, "min_p is 0.5; remove min_p"),
    ({"do_sample": False, "seed": 5}, "seed is 5; remove seed"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID, ids=[str(r[0])[:40] for r in INVALID])
def test_an_invalid_parameter_is_rejected_with_a_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        SamplingParams(**arguments)
    assert message in str(error.value)


def test_the_bounds_of_every_range_are_accepted() -> None:
    SamplingParams(temperature=0.0, top_k=1, top_p=1.0, min_p=0.0, seed=0, logprobs=0, prompt_logprobs=20)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=10, seed=2**32 - 1, min_p=1)
    SamplingParams(logit_bias=dict.fromkeys(range(300), -100), stop_token_ids=range(16), max_length=2)
    SamplingParams(do_sample=False, temperature=0, max_new_tokens=3, min_new_tokens=3)


def test_collections_are_stored_as_tuples_so_that_parameters_are_hashable_and_can_be_replaced() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 1], logit_bias={9: 1, 2: -0.5})
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 1)
    assert params.logit_bias == ((2, -0.5), (9, 1.0))
    again = dataclasses.replace(params, seed=4)
    assert again.logit_bias == params.logit_bias
    assert hash(again) != hash(params)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_parameters_cannot_be_changed_and_survive_pickling() -> None:
    params = SamplingParams(stop=["a"], top_k=-1)
    assert params.top_k is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.stop = "b"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert repr(params) == repr(SamplingParams(stop="a"))


def test_greedy_means_no_sampling_or_temperature_zero() -> None:
    assert SamplingParams(do_sample=False).greedy
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams(temperature=0.01).greedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": ()}, "prompt_token_ids of request 'a' is empty"),
        (
            {"prompt_token_ids": [1]},
            "prompt_token_ids of request 'a' is a list; it must be a tuple; convert it with tuple()",
        ),
        ({"prompt_token_ids": (1, 2**31)}, "prompt_token_ids contains 2147483648"),
        ({"eos_token_ids": (-2,)}, "eos_token_ids contains -2"),
        ({"request_id": ""}, "request_id is ''; it must be a non-empty string"),
        ({"priority": 0.5}, "priority is 0.5; it must be an int"),
        ({"arrival_time": math.nan}, "arrival_time is nan; it must be a finite number"),
        ({"seed": 2**32}, "seed is 4294967296; it must be in [0, 4294967295]"),
    ],
)
def test_an_invalid_request_is_rejected(changes: dict[str, Any], message: str) -> None:
    fields = {"request_id": "a", "prompt_token_ids": (1,), "params": SamplingParams(), "seed": 0}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        Request(**(fields | changes))
    assert message in str(error.value)
