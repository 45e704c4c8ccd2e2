"""Omitted options take the model's own defaults, as in the pipeline."""

from __future__ import annotations

import dataclasses

import pytest

from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest
from tests.serving import tiny_server

DEFAULTS = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}


@pytest.fixture
def with_defaults(monkeypatch):
    """Sets other defaults on the shared engine."""
    intake = tiny_server.engine().intake

    def change(**defaults):
        config = dataclasses.replace(intake.config, generation_config=defaults)
        monkeypatch.setattr(intake, "config", config)
        return intake

    return change


@pytest.mark.parametrize(
    "body",
    [
        CompletionRequest(model="m", prompt="Hi"),
        ChatRequest(model="m", messages=[{"role": "user", "content": "Hi"}]),
    ],
)
def test_omitted_options_take_the_models_defaults(with_defaults, body):
    intake = with_defaults(**DEFAULTS)
    params = body.sampling_params(intake, max_new_tokens=4)
    assert {name: getattr(params, name) for name in DEFAULTS} == DEFAULTS
    explicit = body.model_copy(update={"temperature": 1.0, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0})
    params = explicit.sampling_params(intake, max_new_tokens=4)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty) == (1, None, 1, 0.05, 1)
    params = body.model_copy(update={"temperature": 0.0}).sampling_params(intake, max_new_tokens=4)
    assert params.greedy
    assert (params.top_k, params.top_p, params.min_p) == (None, None, None)


def test_http_answers_follow_the_models_defaults(with_defaults):
    with_defaults(do_sample=False, max_new_tokens=5)

    async def scenario(http, engine):
        chat = {"model": tiny_server.MODEL, "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        answers = [(await http.post("/v1/chat/completions", json=chat)).json() for _ in range(2)]
        greedy = (await http.post("/v1/chat/completions", json={**chat, "temperature": 0, "max_tokens": 7})).json()
        plain = (await http.post("/mii/here", json={"prompts": "Hi", "ignore_eos": True})).json()
        (model,) = (await http.get("/v1/models")).json()["data"]
        assert model["generation_config"] == {"do_sample": False, "max_new_tokens": 5}
        return answers, greedy, plain

    answers, greedy, (plain,) = tiny_server.with_server(scenario)
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [5, 5]
    assert texts[0] == texts[1] == greedy["choices"][0]["message"]["content"][: len(texts[0])]
    assert greedy["usage"]["completion_tokens"] == 7
    assert plain["generated_length"] == 5


def test_a_default_limit_larger_than_the_context_is_reduced(with_defaults):
    with_defaults(max_new_tokens=100_000)

    async def scenario(http, engine):
        chat = {"model": tiny_server.MODEL, "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        return (await http.post("/v1/chat/completions", json=chat)).json()

    usage = tiny_server.with_server(scenario)["usage"]
    assert usage["total_tokens"] == tiny_server.engine().config.max_context_len
