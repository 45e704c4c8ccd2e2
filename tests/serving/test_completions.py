"""POST /v1/completions, /tokenize and /detokenize: the answers of the offline engine in OpenAI's format."""

from __future__ import annotations

import json

import pytest

from tests.serving.tiny_server import MODEL, ask, engine, events, offline, with_server
from tests.tiny import drain, greedy, tokens_of

GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12, "ignore_eos": True}


def test_a_completion_is_the_answer_of_the_offline_engine():
    body = {**GREEDY, "prompt": "Once upon"}
    response = ask("/v1/completions", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer["choices"]
    assert choice["text"] == offline("Once upon", do_sample=False, max_new_tokens=12, ignore_eos=True)
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 12, 22)
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
    assert float(response.headers["x-fastgen-total-ms"]) >= float(response.headers["x-fastgen-first-token-ms"]) > 0


def test_a_stream_has_the_same_text_and_ends_with_the_usage():
    body = {**GREEDY, "prompt": "Once upon"}
    complete = ask("/v1/completions", body).json()
    got = events(ask("/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert "".join(e["choices"][0]["text"] for e in got[:-1]) == complete["choices"][0]["text"]
    assert [e["usage"] for e in got[:-1]] == [None] * (len(got) - 1)
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 12
    assert [e["choices"][0]["finish_reason"] for e in got[:-1]] == [None] * (len(got) - 2) + ["length"]
    every = events(ask("/v1/completions", {**body, "stream": True, "stream_options": {"continuous_usage_stats": True}}))
    counts = [e["usage"]["completion_tokens"] for e in every]  # a slow reader gets several tokens in one event
    assert counts == sorted(set(counts))
    assert counts[-1] == 12
    for options in (None, {"include_usage": False, "continuous_usage_stats": True}, {"include_obfuscation": True}):
        without = events(ask("/v1/completions", {**body, "stream": True, "stream_options": options}))
        assert all("usage" not in e for e in without)
    *_, last = events(ask("/v1/completions", {**body, "stream": True, "stream_options": {"include_timing": True}}))
    assert last["usage"] is None
    assert last["timing"]["total_ms"] >= last["timing"]["first_token_ms"] > 0


def test_several_prompts_and_samples_come_in_order_with_consecutive_seeds():
    body = {"model": MODEL, "prompt": ["Aa", "Bbb"], "n": 2, "seed": 7, "max_tokens": 6, "ignore_eos": True}
    choices = ask("/v1/completions", body).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    for i, (prompt, seed) in enumerate((p, s) for p in ("Aa", "Bbb") for s in (7, 8)):
        alone = ask("/v1/completions", {**body, "prompt": prompt, "n": 1, "seed": seed}).json()
        assert choices[i]["text"] == alone["choices"][0]["text"]
    streamed = events(ask("/v1/completions", {**body, "stream": True}))
    texts = ["".join(e["choices"][0]["text"] for e in streamed if e["choices"][0]["index"] == i) for i in range(4)]
    assert texts == [c["text"] for c in choices]


def test_a_negative_seed_is_accepted():
    body = {"model": MODEL, "prompt": "x", "seed": -1, "max_tokens": 4}
    assert (
        ask("/v1/completions", body).json()["choices"][0]["text"]
        == ask("/v1/completions", {**body, "seed": 2**32 - 1}).json()["choices"][0]["text"]
    )


def test_a_stop_string_ends_the_text_before_it():
    text = offline("Once upon", do_sample=False, max_new_tokens=12, ignore_eos=True)
    stop = text[4:6]
    answer = ask("/v1/completions", {**GREEDY, "prompt": "Once upon", "stop": [stop, "never"]}).json()["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("more", [-2, -1, 0, 1])
def test_a_stop_string_may_begin_before_the_minimum_number_of_tokens_but_ends_after_it(more):
    shared = engine()
    request_id = shared.add("Once upon", greedy(12))
    ids = tokens_of(drain(shared)[request_id])
    shown = [i for i, token_id in enumerate(ids) if shared.tokenizer.decode([token_id])]
    text = shared.tokenizer.decode(ids)
    stop, minimum = text[4:6], shown[5] + 1 + more  # it ends with token shown[5], counted from 0
    assert text.count(stop) == 1
    body = {**GREEDY, "prompt": "Once upon", "stop": [stop], "min_tokens": minimum}
    answer = ask("/v1/completions", body).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ((text[:4], "stop") if more < 0 else (text, "length"))
    streamed = events(ask("/v1/completions", {**body, "stream": True}))
    assert "".join(e["choices"][0]["text"] for e in streamed) == answer["text"]


@pytest.mark.parametrize("path", ["/v1/completions", "/mii/here"])
def test_the_text_of_a_special_token_works_as_a_stop_string_although_it_is_skipped(path):
    # The bias makes the model write the beginning-of-sequence token, which is skipped in the text.
    end, more = (
        ({"max_tokens": 12, "temperature": 0}, {"model": MODEL, "prompt": "Once"})
        if path[1] == "v"
        else ({"max_new_tokens": 12, "do_sample": False}, {"prompts": "Once"})
    )
    body = {**more, **end, "ignore_eos": True, "logit_bias": {"1": 100}}

    def answer(stop):
        got = ask(path, {**body, "stop": stop}).json()
        if path[1] == "v":
            return got["choices"][0]["text"], got["choices"][0]["finish_reason"], got["usage"]["completion_tokens"]
        return got[0]["generated_text"], got[0]["finish_reason"], got[0]["generated_length"]

    assert answer(["<s>"]) == ("", "stop", 1)
    assert answer(["<s><s><s>"]) == ("", "stop", 3)
    assert answer(["s", "</s>", "<"]) == ("", "length", 12)  # part of its text, another token


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_logprobs_scores_the_prompt(max_tokens):
    body = {**GREEDY, "prompt": "Hello", "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    answer = ask("/v1/completions", body).json()
    (choice,) = answer["choices"]
    scores = choice["logprobs"]
    assert choice["text"].startswith("<s>Hello")
    assert scores["tokens"][:6] == ["<s>", "H", "e", "l", "l", "o"]
    assert scores["token_logprobs"][0] is None
    assert all(value <= 0 for value in scores["token_logprobs"][1:])
    assert len(scores["tokens"]) == 6 + max_tokens == len(scores["top_logprobs"]) == len(scores["text_offset"])
    columns = (scores[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in zip(*columns, strict=True):
        assert top[token] == logprob  # also if it is not among the most likely
        assert len(top) in (2, 3)
    assert scores["text_offset"][:3] == [0, 3, 4]
    assert answer["usage"]["completion_tokens"] == max_tokens
    if max_tokens:  # the greedy token is the most likely
        assert scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values())
    streamed = events(ask("/v1/completions", {**body, "stream": True}))
    assert "".join(e["choices"][0]["text"] for e in streamed) == choice["text"]
    assert [t for e in streamed for t in e["choices"][0]["logprobs"]["tokens"]] == scores["tokens"]


def test_the_sampled_token_is_among_the_alternatives_even_if_it_is_unlikely():
    body = {"model": MODEL, "prompt": "Once", "temperature": 2.0, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    for number in (0, 1, 3):
        scores = ask("/v1/completions", {**body, "logprobs": number}).json()["choices"][0]["logprobs"]
        for token, logprob, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
            assert len(top) in ((number, number + 1) if number else (0,))
            assert not number or top[token] == logprob


def test_bias_penalties_and_extensions_reach_the_sampler():
    base = ask("/v1/completions", {**GREEDY, "prompt": "Once"}).json()["choices"][0]["text"]
    forced = {**GREEDY, "prompt": "Once", "logit_bias": {"40": 100}}
    assert ask("/v1/completions", forced).json()["choices"][0]["text"] == engine().tokenizer.decode([40]) * 12
    for options in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}):
        assert ask("/v1/completions", {**GREEDY, "prompt": "Once", **options}).json()["choices"][0]["text"] != base
    sampled = {"model": MODEL, "prompt": "Once", "max_tokens": 12, "temperature": 2.0, "seed": 3, "ignore_eos": True}
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ask("/v1/completions", {**sampled, **options}).json()["choices"][0]["text"] == base
    assert ask("/v1/completions", sampled).json()["choices"][0]["text"] != base


def test_detokenize_reverses_tokenize():
    there = ask("/tokenize", {"prompt": "Hi you"}).json()
    assert there["count"] == 7
    assert ask("/detokenize", {"tokens": there["tokens"]}).json() == {"prompt": "<s>Hi you"}
    chat = ask("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert ask("/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": "u:Hi\na:"}


def test_the_generation_options_of_the_pipeline_work_over_http():
    body = {"prompts": ["Aa", "Bb"], "do_sample": False, "max_new_tokens": 5, "ignore_eos": True, "logprobs": 1}
    answers = ask("/mii/here", body).json()
    assert [a["generated_text"] for a in answers] == [
        offline(p, do_sample=False, max_new_tokens=5, ignore_eos=True) for p in ("Aa", "Bb")
    ]
    assert all(a["generated_length"] == 5 and a["prompt_length"] == 3 and len(a["logprobs"]) == 5 for a in answers)
    full = ask("/mii/here", {**body, "return_full_text": True}).json()
    assert [a["generated_text"][:2] for a in full] == ["Aa", "Bb"]
    streamed = events(ask("/mii/here", {**body, "stream": True}))
    assert "".join(e["text"] for e in streamed if e["index"] == 1) == answers[1]["generated_text"]
    assert ask("/mii/there", body).status_code == 404
    half = with_server(lambda client, _: client.post("/mii/here", content=json.dumps({**body, "stop": ["x", "\ud800"]})))
    assert (half.status_code, half.json()["error"]["param"]) == (400, "stop")
    biased = ask("/mii/here", {**body, "logit_bias": {"40": 100}}).json()  # keys of a JSON object are strings
    assert [a["token_ids"] for a in biased] == [[40] * 5] * 2


def test_models_health_and_version_are_served():
    async def scenario(client, _):
        models = (await client.get("/v1/models")).json()
        assert [(m["id"], m["generation_config"]) for m in models["data"]] == [(MODEL, {})]
        assert (await client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"
        assert (await client.get("/health")).json()["status"] == "ready"
        assert (await client.get("/version")).status_code == 200

    with_server(scenario)
