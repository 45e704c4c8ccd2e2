"""The length limit of requests with a cache smaller than the context, and the error for longer ones."""

from __future__ import annotations

from functools import cache

import openai
import pytest

from fastgen_jax import Engine, EngineConfig
from tests.serving.tiny_server import MODEL, tokenizer, with_server
from tests.tiny import tiny_model

CACHE = 64  # tokens; the context has 128


@cache
def small():
    params, model = tiny_model()
    config = EngineConfig(token_budget=8, budget_ladder=(), max_num_seqs=2, block_size=4, num_blocks=CACHE // 4)
    return Engine(params, model, config, tokenizer=tokenizer())


def ask(path, body=None):
    async def scenario(client, _):
        return await (client.get(path) if body is None else client.post(path, json=body))

    return with_server(scenario, shared=small())


def chat(text, **options):
    return ask("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": text}], **options})


def test_without_max_tokens_an_answer_may_fill_a_cache_smaller_than_the_context():
    answer = chat("Hi", ignore_eos=True).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CACHE
    (answer,) = ask("/mii/here", {"prompts": "Hi", "ignore_eos": True}).json()
    assert answer["prompt_length"] + answer["generated_length"] == CACHE
    answer = ask("/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": None, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == CACHE


def test_the_reported_limit_is_that_of_the_cache():
    assert ask("/v1/models").json()["data"][0]["max_model_len"] == CACHE
    assert ask("/tokenize", {"prompt": "x"}).json()["max_model_len"] == CACHE


@pytest.mark.parametrize(
    ("length", "options", "words"),
    [
        (300, {}, "your messages resulted in 305 tokens"),
        (100, {}, "your messages resulted in 105 tokens"),
        (CACHE - 5, {}, f"your messages resulted in {CACHE} tokens"),
        (10, {"max_tokens": 90}, "you requested 105 tokens (15 in the messages, 90 in the completion)"),
    ],
)
def test_a_chat_that_is_too_long_is_refused_with_openais_message(length, options, words):
    response = chat("x" * length, **options)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(f"This model's maximum context length is {CACHE} tokens. However, {words}: ")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "messages", "context_length_exceeded")
    assert chat("x" * (CACHE - 6)).status_code == 200


def test_other_prompts_that_are_too_long_have_the_same_error_code():
    for path, body, param in (
        ("/v1/completions", {"model": MODEL, "prompt": "x" * 300}, "prompt"),
        ("/mii/here", {"prompts": ["x", "x" * 300]}, "prompts"),
    ):
        error = ask(path, body).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")


def test_openais_sdk_recognizes_the_error_by_its_code(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                sdk.chat.completions.create(model=MODEL, stream=stream, messages=[{"role": "user", "content": "x" * 300}])
            assert caught.value.code == "context_length_exceeded"
            assert caught.value.param == "messages"
