"""Options of calls and engines: sources of values, names from other programs, and default limits."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from fastgen_jax import EngineConfig, Pipeline, SamplingParams
from fastgen_jax.api import options
from fastgen_jax.api.options import generation_of, sampling_params
from fastgen_jax.engine import option_names
from fastgen_jax.engine.generation import DEFAULTS
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.resolve import resolve
from tests.tiny import drain, tiny_engine, tiny_model, tokens_of

GREEDY = {"do_sample": False, "ignore_eos": True}


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_engine())


def test_sampling_params_and_the_same_options_give_the_same_answer(pipe):
    params = SamplingParams(max_new_tokens=4, temperature=1.5, seed=3, ignore_eos=True)
    (by_name,) = pipe([5, 6], max_new_tokens=4, temperature=1.5, seed=3, ignore_eos=True)
    assert pipe([5, 6], params)[0].token_ids == pipe([5, 6], params=params)[0].token_ids == by_name.token_ids
    assert tuple(t for output in pipe.stream([5, 6], params) for t in output.new_token_ids) == by_name.token_ids
    assert tuple(t for output in pipe.stream([5, 6], params=params) for t in output.new_token_ids) == by_name.token_ids
    several = pipe([[5, 6], [7]], dataclasses.replace(params, n=2))
    assert len(several) == 4
    assert several[0].token_ids == by_name.token_ids


def test_sampling_params_with_options_or_of_another_type_are_refused(pipe):
    with pytest.raises(ValueError, match=r"both params and options \(temperature\) were passed.*dataclasses.replace"):
        pipe([5], SamplingParams(), temperature=1.0)
    with pytest.raises(ValueError, match=r"both params and options \(n\)"):
        pipe.stream([5], params=SamplingParams(), n=2)
    with pytest.raises(ValueError, match=r"params is a dict; pass fastgen_jax.SamplingParams, or options as keywords"):
        pipe([5], {"max_new_tokens": 4})
    assert not pipe.engine.has_work


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "use 'max_new_tokens';"),
        ("temp", "use 'temperature';"),
        ("topk", "use 'top_k';"),
        ("top-k", "did you mean 'top_k'?"),
        ("stop_sequences", "use 'stop';"),
        ("num_return_sequences", "use 'n';"),
        ("streaming", "use 'stream';"),
        ("temprature", "did you mean 'temperature'?"),
        ("max_new_token", "did you mean 'max_new_tokens'?"),
        ("num_beams", "beam search is not supported; use n=..."),
        ("xyzzy", "unknown option 'xyzzy'; generation options: adapter"),
    ],
)
def test_an_unknown_option_of_a_call_is_refused_with_a_suggestion(pipe, name, hint):
    with pytest.raises(ValueError, match="unknown option") as refusal:
        pipe([5], **{name: 1})
    assert hint in str(refusal.value)
    assert "bad_words, choice, do_sample, echo" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_model_len", "use 'max_context_len'; engine options: adapters"),
        ("tensor_parallel_size", "use 'tensor_parallel';"),
        ("kv_cache_dtype", "use 'kv_dtype';"),
        ("max_num_batched_tokens", "use 'token_budget';"),
        ("gpu_memory_utilization", "num_blocks sets its size"),
        ("device_map", "JAX_PLATFORMS"),
        ("token_buget", "did you mean 'token_budget'?"),
        ("xyzzy", "unknown option 'xyzzy'; engine options: adapters"),
        ("temperature", "an option of a call, not of the engine; pass it there, pipe(prompt, temperature=...), or"),
    ],
)
def test_an_unknown_option_of_an_engine_is_refused_with_a_suggestion(name, hint):
    with pytest.raises(ValueError, match=name) as refusal:
        EngineConfig.from_options({name: 1})
    assert hint in str(refusal.value)


def test_an_engine_option_in_a_call_is_refused_with_the_right_place(pipe):
    with pytest.raises(ValueError, match=r"'max_context_len' is an option of the engine.*pipeline\(model, max_context_len="):
        pipe([5], max_context_len=64)


def test_names_from_other_programs_lead_to_existing_options():
    calls = {f.name for f in dataclasses.fields(SamplingParams)} | set(options.CALL_OPTIONS)
    engines = {f.name for f in dataclasses.fields(EngineConfig)}
    for other_names, known in ((options._OTHER_NAMES, calls), (option_names._OTHER_NAMES, engines)):
        assert not other_names.keys() & known
        assert {target for target in other_names.values() if " " not in target} <= known


def test_the_documentation_of_sampling_has_every_option_and_every_model_default():
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    for name in (*(f.name for f in dataclasses.fields(SamplingParams)), *DEFAULTS, "generation_config"):
        assert f"`{name}`" in page, name
    assert f"else {options.DEFAULT_NEW_TOKENS} |" in page


# Defaults of the model


def with_defaults(**defaults):
    return tiny_engine(generation_config=tuple(defaults.items()))


def params_of(given, **defaults):
    model = tiny_model()[1]
    intake = Intake(None, model, resolve(EngineConfig(num_blocks=64, generation_config=defaults), model))
    return generation_of(intake, None, given).params


def test_model_defaults_apply_to_options_that_are_left_out_or_none():
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    for given in ({}, {"temperature": None, "top_p": None}):
        params = params_of(given, **defaults)
        assert {name: getattr(params, name) for name in defaults} == defaults
    params = params_of({"temperature": 1.5, "top_k": 0, "top_p": 1.0}, **defaults)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.5, None, 1.0, 0.05)


@pytest.mark.parametrize("greedy", [{"do_sample": False}, {"temperature": 0}])
def test_a_greedy_request_overrides_defaults_that_sample(greedy):
    params = params_of(greedy, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    assert params.greedy
    assert (params.top_k, params.repetition_penalty) == (None, 1.1)


def test_a_model_that_is_greedy_by_default_can_sample():
    assert params_of({}, do_sample=False, temperature=0.6, top_p=0.9).greedy
    assert not params_of({"do_sample": True}, do_sample=False).greedy
    assert params_of({"temperature": 0.7}, do_sample=False).temperature == 0.7


def test_without_model_defaults_the_full_distribution_is_sampled():
    assert params_of({}) == SamplingParams()
    assert sampling_params({"temperature": None}) == SamplingParams()


def test_an_engine_uses_model_defaults_without_parameters_and_only_the_parameters_with_them():
    engine = with_defaults(do_sample=False, max_new_tokens=3)
    plain = tiny_engine()
    for chosen, params in ((engine, None), (plain, SamplingParams(do_sample=False, max_new_tokens=3))):
        request_id = chosen.add([5, 6], params)
        answers = drain(chosen)[request_id]
        tokens = tokens_of(answers)
        assert len(tokens) <= 3
        assert tokens == tokens_of_greedy(plain)[: len(tokens)]
    assert engine.intake.request((5,), SamplingParams(temperature=0.5)).params == SamplingParams(temperature=0.5)


def tokens_of_greedy(engine):
    request_id = engine.add([5, 6], SamplingParams(do_sample=False, max_new_tokens=3))
    return tokens_of(drain(engine)[request_id])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("vllm", "choose 'auto' .*, 'none', or pass defaults"),
        ({"temprature": 1}, "has 'temprature', but defaults can be set for .*; did you mean 'temperature'?"),
        ({"top_p": 0}, r"top_p is 0; it must be in \(0, 1\]"),
        ('{"temperature"', "which is not JSON"),
        (5, "generation_config is 5; choose"),
    ],
)
def test_an_invalid_setting_of_the_defaults_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(generation_config=setting)


def test_defaults_can_be_given_as_a_mapping_or_as_json_and_configs_stay_hashable():
    config = EngineConfig(generation_config={"temperature": 0.6, "top_k": 0})
    assert config == EngineConfig(generation_config='{"temperature": 0.6}')
    assert hash(config) == hash(EngineConfig(generation_config=(("temperature", 0.6),)))
    again = EngineConfig.from_options(dataclasses.asdict(config))  # as a router sends it to its replicas
    assert again == config


# Lengths


def test_an_answer_without_a_limit_ends_at_the_default_with_one_warning(pipe, caplog, monkeypatch):
    assert options.DEFAULT_NEW_TOKENS == 256
    monkeypatch.setattr(options, "DEFAULT_NEW_TOKENS", 9)  # the tiny model's context is shorter
    with caplog.at_level(logging.WARNING, "fastgen_jax"):
        (response,) = pipe([5, 6], **GREEDY)
        assert (response.generated_length, response.finish_reason) == (9, "length")
        assert len(list(pipe.stream([5, 6], **GREEDY))) == 9
    (record,) = caplog.records
    assert record.getMessage() == (
        "an answer was cut off after 9 tokens, the default limit; pass max_new_tokens=... to change it (shown once)"
    )


def test_the_model_limit_precedes_the_default_and_yields_to_every_option(caplog):
    pipe = Pipeline(with_defaults(max_new_tokens=5))
    with caplog.at_level(logging.WARNING, "fastgen_jax"):
        assert pipe([5, 6], **GREEDY)[0].generated_length == 5
        assert "after 5 tokens, the limit of the model's generation_config" in caplog.text
        caplog.clear()
        assert pipe([5, 6], max_new_tokens=7, **GREEDY)[0].generated_length == 7
        assert pipe([5, 6], max_length=6, **GREEDY)[0].generated_length == 4
        assert pipe([5, 6], min_new_tokens=8, **GREEDY)[0].generated_length == 8
    assert not [record for record in caplog.records if "after 7" in record.getMessage() or "after 4" in record.getMessage()]


def test_a_requested_limit_causes_no_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING, "fastgen_jax"):
        pipe([5, 6], max_new_tokens=3, **GREEDY)
        pipe([5, 6], max_length=6, **GREEDY)
        pipe([5, 6], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "name", "room"),
    [
        ({}, "max_context_len", 126),
        pytest.param({"num_blocks": 18}, "num_blocks", 70, marks=pytest.mark.slow),
    ],
)
def test_a_default_limit_yields_to_the_room_and_a_full_context_is_reported(settings, name, room, caplog):
    pipe = Pipeline(tiny_engine(**settings))
    with caplog.at_level(logging.WARNING, "fastgen_jax"):
        (response,) = pipe([5, 6], **GREEDY)
    assert response.generated_length == room
    (record,) = caplog.records
    assert (
        f"after a prompt of 2 tokens there was room for {room}; shorten the prompt, or start with a larger {name}"
        in record.getMessage()
    )
