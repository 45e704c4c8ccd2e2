"""Fields of requests beyond the usual ones: those of vLLM's server, and those of OpenAI's that ask for nothing."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.api.client import Client
from tests.serving.test_history import local_client
from tests.serving.tiny_server import MODEL, ask, engine, events, offline, tokenizer, with_server
from tests.tiny import drain, greedy

COMPLETION = {"model": MODEL, "prompt": "Once upon", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
USER = {"role": "user", "content": "Hi"}
CHAT = {"model": MODEL, "messages": [USER], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
TEXT = "Once upon"


def choice(path, body, **config):
    response = ask(f"/v1/{path}", body, **config)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def ids_of(text):
    return tokenizer().encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def text():
    """The answer to `COMPLETION`."""
    return offline(TEXT, do_sample=False, max_new_tokens=12, ignore_eos=True)


# Values that ask for nothing


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_fields_that_mean_nothing_here_are_accepted(path):
    fields = {
        "metadata": {"team": "a"},
        "user": "me",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "service_tier": "flex",
        "store": False,
        "spaces_between_special_tokens": False,
        "guided_decoding_backend": "xgrammar",
        "logits_processors": [],
        "vllm_xargs": {},
    }
    if path.startswith("chat"):
        fields |= {
            "reasoning_effort": "none",
            "function_call": "none",
            "functions": [],
            "verbosity": "medium",
            "tool_choice": "auto",
            "modalities": ["text"],
            "tools": [{"type": "function", "function": {"name": "f", "more": 1}, "cache_control": {"type": "ephemeral"}}],
            "messages": [{**USER, "cache_control": {"type": "ephemeral"}, "unknown": 1}],
        }
    answer = ask(f"/v1/{path}", {**(CHAT if "messages" in fields else COMPLETION), **fields}).json()
    assert answer["service_tier"] == "default"
    assert answer["system_fingerprint"].startswith("fp_")


@pytest.mark.parametrize("name", ["audio", "logits_processors", "kv_transfer_params"])
def test_fields_that_ask_for_something_else_are_refused(name):
    error = ask("/v1/chat/completions", {**CHAT, name: 5}).json()["error"]
    assert f"{name}=5 is not supported" in error["message"]
    assert error["param"] == name


def test_the_limit_has_both_of_its_names_everywhere():
    for path, base in (("completions", COMPLETION), ("chat/completions", CHAT)):
        short = {name: value for name, value in base.items() if name != "max_tokens"}
        answer = ask(f"/v1/{path}", {**short, "max_completion_tokens": 3}).json()
        assert answer["usage"]["completion_tokens"] == 3
    assert choice("chat/completions", {**CHAT, "max_completion_tokens": 8})["finish_reason"] == "length"
    error = ask("/v1/chat/completions", {**CHAT, "max_completion_tokens": 4}).json()["error"]
    assert "mean the same" in error["message"]
    error = ask("/v1/completions", {**COMPLETION, "max_completion_tokens": 2, "min_tokens": 5}).json()["error"]
    assert error["message"].startswith("min_tokens is 5 but max_completion_tokens is 2")
    assert error["param"] == "min_tokens"


def test_a_path_without_the_version_gets_a_hint():
    for path in ("/chat/completions", "/completions"):
        error = ask(path, CHAT).json()["error"]
        assert f"/v1{path}" in error["message"]
        assert "base_url" in error["message"]
    assert "base_url" in ask("/models").json()["error"]["message"]
    assert "base_url" not in ask("/nothing").json()["error"]["message"]


def test_a_model_may_have_several_names():
    async def scenario(client, _):
        state = client._transport.app.state.server
        state.model.other_names = ("gpt-4o",)
        state.model.root = "/models/tiny"
        cards = (await client.get("/v1/models")).json()["data"]
        answer = await client.post("/v1/completions", json={**COMPLETION, "model": "gpt-4o"})
        return cards, answer.json(), (await client.get("/v1/models/gpt-4o")).json()

    cards, answer, card = with_server(scenario)
    assert [c["id"] for c in cards] == [MODEL, "gpt-4o"]
    assert answer["model"] == card["id"] == "gpt-4o"
    assert card["root"] == "/models/tiny"
    assert card["max_model_len"] == engine().config.longest_sequence


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "Hi", "max_tokens": 2}),
        ("chat/completions", {"messages": [USER], "max_tokens": 2}),
        ("responses", {"input": "Hi", "max_output_tokens": 2}),
        ("embeddings", {"input": "Hi"}),
        ("score", {"text_1": "Hi", "text_2": "Ho"}),
        ("rerank", {"query": "Hi", "documents": ["Ho"]}),
    ],
)
def test_a_request_without_a_model_is_answered_by_the_one_that_is_served(path, body):
    for fields in (body, {**body, "model": None}):
        answer = ask(f"/v1/{path}", fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == MODEL


def test_a_list_of_models_is_in_the_format_of_anthropic_for_its_clients():
    async def scenario(client, _):
        client._transport.app.state.server.model.other_names = ("b", "c")
        client.headers["anthropic-version"] = "2023-06-01"
        paths = ("", "?limit=2", "?after_id=b", "?before_id=c&limit=1", "/b", "/none", "?after_id=z", "?limit=0")
        return [(await client.get(f"/v1/models{path}")) for path in paths]

    *pages, one, missing, unknown, invalid = with_server(scenario)
    lists = [page.json() for page in pages]
    assert [[model["id"] for model in page["data"]] for page in lists] == [[MODEL, "b", "c"], [MODEL, "b"], ["c"], ["b"]]
    assert [page["has_more"] for page in lists] == [False, True, False, True]
    assert [(page["first_id"], page["last_id"]) for page in lists] == [(MODEL, "c"), (MODEL, "b"), ("c", "c"), ("b", "b")]
    assert one.json() == lists[0]["data"][1]
    assert (one.json()["type"], one.json()["lifecycle"]) == ("model", "active")
    assert one.json()["max_tokens"] == engine().config.longest_sequence
    assert one.json()["created_at"].endswith("Z")
    assert [(r.status_code, r.json()["error"]["type"]) for r in (missing, unknown, invalid)] == [
        (404, "not_found_error"),
        *[(400, "invalid_request_error")] * 2,
    ]


# Log-probabilities of the prompt


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_prompt_logprobs_list_the_token_of_each_position_and_the_most_likely_ones(path):
    body = CHAT if path[1] == "h" else COMPLETION
    answer = ask(f"/v1/{path}", {**body, "prompt_logprobs": 2, "return_token_ids": True}).json()
    holder = answer if path[1] == "h" else answer["choices"][0]
    (first, *rest), ids = holder["prompt_logprobs"], holder["prompt_token_ids"]
    assert first is None
    assert len(rest) == len(ids) - 1
    for token_id, position in zip(ids[1:], rest, strict=True):
        told = position[str(token_id)]
        assert next(iter(position)) == str(token_id)
        assert told["decoded_token"] == tokenizer().decode([token_id], skip_special_tokens=False)
        assert len(position) == (2 if told["rank"] <= 2 else 3)
        assert sorted(entry["rank"] for entry in position.values())[:2] == [1, 2]
        by_rank = sorted(position.values(), key=lambda entry: entry["rank"])
        assert [e["logprob"] for e in by_rank] == sorted((e["logprob"] for e in by_rank), reverse=True)
    request_id = engine().add(ids, greedy(1, prompt_logprobs=0))
    expected = drain(engine())[request_id][0].prompt_logprobs
    assert [position[str(i)]["logprob"] for i, position in zip(ids[1:], rest, strict=True)] == [
        pytest.approx(entry.logprob, abs=1e-5) for entry in expected
    ]


def test_prompt_logprobs_beside_echo_have_their_own_number_of_alternatives():
    found = choice("completions", {**COMPLETION, "prompt_logprobs": 3, "echo": True, "logprobs": 1})
    assert {len(top) for top in found["logprobs"]["top_logprobs"][1:]} <= {1, 2}
    assert {len(position) for position in found["prompt_logprobs"][1:]} <= {3, 4}
    plain = choice("completions", {**COMPLETION, "echo": True, "logprobs": 1})
    assert found["logprobs"]["top_logprobs"] == plain["logprobs"]["top_logprobs"]
    assert "prompt_logprobs" not in plain
    drawn = {**COMPLETION, "temperature": 0.5, "seed": 1, "logprobs_mode": "processed"}
    assert len(choice("completions", {**drawn, "prompt_logprobs": 0})["prompt_logprobs"][3]) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "belong to complete answers"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"prompt_logprobs": 1, "use_beam_search": True, "n": 2}, "cannot be combined with use_beam_search"),
        ({"prompt_logprobs": 1, "logprobs_mode": "processed", "temperature": 1}, "use prompt_logprobs=0"),
    ],
)
def test_prompt_logprobs_that_cannot_be_returned_are_refused(fields, message):
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        response = ask(f"/v1/{path}", {**body, "ignore_eos": None, **fields})
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "prompt_logprobs"


# The prompt


def test_the_last_message_can_be_continued():
    messages = [USER, {"role": "assistant", "content": "Well"}]
    body = {**CHAT, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    got = choice("chat/completions", body)["message"]["content"]
    assert got == offline(ids_of("u:Hi\na:Well"), do_sample=False, max_new_tokens=8, ignore_eos=True)
    assert choice("chat/completions", {**body, "echo": True})["message"]["content"] == f"Well{got}"
    streamed = events(ask("/v1/chat/completions", {**body, "echo": True, "stream": True}))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == f"Well{got}"
    rendered = ask("/v1/chat/completions/render", body).json()
    assert rendered["prompt"] == ask("/apply-template", body).json()["prompt"] == "u:Hi\na:Well"
    counted = {name: value for name, value in body.items() if name in ("messages", "continue_final_message")}
    assert ask("/tokenize", counted).json()["tokens"] == rendered["token_ids"]
    open_end = {"messages": [USER], "add_generation_prompt": False, "return_token_strs": True}
    assert "".join(ask("/tokenize", open_end).json()["token_strs"]) == "u:Hi\n"
    assert "exclude each other" in ask("/tokenize", {**counted, "add_generation_prompt": True}).json()["error"]["message"]
    empty = {"messages": [USER, {"role": "assistant", "content": " "}], "continue_final_message": True}
    assert "is not in the prompt" in ask("/tokenize", empty).json()["error"]["message"]


def test_a_template_of_the_request_is_run_only_if_the_server_allows_it():
    body = {**CHAT, "chat_template": "{{ messages[0].content }}{{ documents[0].title }}", "documents": [{"title": "T"}]}
    refused = ask("/apply-template", body).json()["error"]
    assert refused["param"] == "chat_template"
    assert "--trust-request-chat-template" in refused["message"]
    allowed = {"trust_request_chat_template": True}
    assert ask("/apply-template", body, **allowed).json()["prompt"] == "HiT"
    file = ask("/apply-template", {**body, "chat_template": "/etc/passwd"}, **allowed).json()["error"]
    assert "not the text of a template" in file["message"]


def test_special_tokens_and_the_length_of_the_prompt_are_a_choice():
    body = {**COMPLETION, "max_tokens": 1, "echo": True}
    assert choice("completions", body)["text"].startswith("<s>Once upon")
    assert choice("completions", {**body, "add_special_tokens": False})["text"].startswith("Once upon")
    assert choice("completions", {**body, "truncate_prompt_tokens": 3})["text"].startswith("pon")
    long = {**body, "prompt": "x" * 500, "truncate_prompt_tokens": -1}
    usage = ask("/v1/completions", long).json()["usage"]
    assert usage["total_tokens"] == engine().config.longest_sequence
    assert ask("/tokenize", {"messages": [USER], "add_special_tokens": True}).json()["tokens"][0] == 1


def test_prompts_with_different_salts_share_no_cached_prefix():
    def cached(**salt):
        body = {**COMPLETION, "prompt": "The same prompt of some length", "max_tokens": 1, **salt}
        return ask("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") > 0
    assert cached(cache_salt="b") == 0


# The text


def test_the_reason_to_stop_is_returned_and_the_stop_string_may_be(text):
    body = {**COMPLETION, "stop": ["never", text[4:6]]}
    got = choice("completions", body)
    assert (got["text"], got["stop_reason"]) == (text[:4], text[4:6])
    assert choice("completions", {**body, "include_stop_str_in_output": True})["text"] == text[:6]
    *_, last = events(ask("/v1/completions", {**body, "stream": True}))
    assert last["choices"][0]["stop_reason"] == text[4:6]
    assert choice("completions", COMPLETION)["stop_reason"] is None
    forced = {**COMPLETION, "logit_bias": {"40": 100}, "stop_token_ids": [40]}
    assert choice("completions", forced)["stop_reason"] == 40
    special = choice("completions", {**COMPLETION, "logit_bias": {"1": 100}, "stop": ["<s><s>"]})
    assert special["stop_reason"] == "<s><s>"
    assert choice("chat/completions", {**CHAT, "stop": list("abcdefghijklmnopqrstuvwxyz")})["finish_reason"] == "stop"
    error = ask("/v1/completions", {**COMPLETION, "stop": ["x" * 999] * 17}).json()["error"]
    assert "more than 16000" in error["message"]


def test_special_tokens_are_shown_on_request_except_the_one_that_ends_the_answer():
    forced = {**COMPLETION, "logit_bias": {"1": 100}, "max_tokens": 3}
    assert choice("completions", forced)["text"] == ""
    assert choice("completions", {**forced, "skip_special_tokens": False})["text"] == "<s>" * 3
    ended = {**COMPLETION, "logit_bias": {"2": 100}, "ignore_eos": False, "skip_special_tokens": False}
    assert choice("completions", ended)["text"] == ""
    assert choice("completions", {**ended, "include_stop_str_in_output": True})["text"] == "</s>"


def test_no_event_is_empty_while_text_is_held_back():
    body = {**CHAT, "stop": ["xy"], "logit_bias": {str(ids_of("x")[0]): 100}, "stream": True}
    deltas = [event["choices"][0] for event in events(ask("/v1/chat/completions", body))]
    assert {character for d in deltas[1:-1] for character in d["delta"].get("content") or "-"} == {"x"}
    assert deltas[0]["delta"]["role"] == "assistant"


# Tokens


def test_token_ids_are_returned_on_request():
    for path, base in (("completions", COMPLETION), ("chat/completions", CHAT)):
        body = {**base, "return_token_ids": True}
        answer = ask(f"/v1/{path}", body).json()
        got = answer["choices"][0]
        prompt = answer.get("prompt_token_ids") or got["prompt_token_ids"]
        assert len(prompt) == answer["usage"]["prompt_tokens"]
        text = got["text"] if path == "completions" else got["message"]["content"]
        assert tokenizer().decode(got["token_ids"]) == text
        streamed = events(ask(f"/v1/{path}", {**body, "stream": True}))
        first = streamed[0].get("prompt_token_ids") or streamed[0]["choices"][0]["prompt_token_ids"]
        assert first == prompt
        assert "prompt_token_ids" not in {*streamed[1], *streamed[1]["choices"][0]}
        assert [i for e in streamed for i in e["choices"][0]["token_ids"]] == got["token_ids"]


def test_log_probabilities_may_name_tokens_by_their_ids():
    scores = choice("completions", {**COMPLETION, "logprobs": 1, "return_tokens_as_token_ids": True})["logprobs"]
    assert all(token.startswith("token_id:") for token in scores["tokens"])
    body = {**CHAT, "logprobs": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    got = choice("chat/completions", body)
    assert [entry["token"] for entry in got["logprobs"]["content"]] == [f"token_id:{i}" for i in got["token_ids"]]


def test_offsets_count_characters_of_the_text():
    body = {**COMPLETION, "logprobs": 0, "echo": True, "logit_bias": {"1": 100}, "max_tokens": 3}
    got = choice("completions", body)
    # The answer's special tokens are spelled among the tokens but are not in the text.
    assert got["text"] == "<s>Once upon"
    assert got["logprobs"]["tokens"][-3:] == ["<s>"] * 3
    assert got["logprobs"]["text_offset"] == [0, *range(3, 12), 12, 12, 12]
    assert got["logprobs"]["top_logprobs"] == [None, *[{}] * 12]


def test_only_allowed_tokens_are_sampled():
    allowed = ids_of("abc")
    sampled = {**COMPLETION, "temperature": 3.0, "seed": 1}
    assert set(choice("completions", {**sampled, "allowed_token_ids": allowed})["text"]) == set("abc")
    guided = choice("completions", {**sampled, "allowed_token_ids": ids_of("ab1"), "guided_regex": "[a-z]{4}[0-9]"})
    assert set(guided["text"][:4]) <= set("ab")
    assert guided["text"][4:] == "1"
    error = ask("/v1/completions", {**COMPLETION, "allowed_token_ids": [4000]}).json()["error"]
    assert error["param"] == "allowed_token_ids"
    assert ask("/v1/completions", {**COMPLETION, "allowed_token_ids": []}).status_code == 400


def test_bad_words_are_not_generated(text):
    single = choice("completions", {**COMPLETION, "bad_words": [text[4]]})["text"]
    assert text[4] in text
    assert text[4] not in single
    several = choice("completions", {**COMPLETION, "bad_words": [text[3:6]]})["text"]
    assert several[:5] == text[:5]
    assert text[3:6] not in several
    assert text[3:6] in text
    forced = {**COMPLETION, "logit_bias": {str(ids_of("x")[0]): 100}, "bad_words": ["xx"], "skip_special_tokens": False}
    assert "xx" not in choice("completions", forced)["text"]


def test_the_best_of_several_samples_are_returned():
    body = {**COMPLETION, "temperature": 2.0, "seed": 3, "logprobs": 0, "n": 4, "max_tokens": 5}
    every = ask("/v1/completions", body).json()["choices"]
    best = sorted(every, key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    answer = ask("/v1/completions", {**body, "n": 2, "best_of": 4}).json()
    assert [c["text"] for c in answer["choices"]] == [c["text"] for c in best[:2]]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 20
    without = ask("/v1/completions", {**body, "n": 2, "best_of": 4, "logprobs": None}).json()["choices"]
    assert [c["logprobs"] for c in without] == [None, None]
    chat = {**CHAT, "temperature": 2.0, "seed": 3, "best_of": 3}
    assert len(ask("/v1/chat/completions", chat).json()["choices"]) == 1


def test_a_salt_and_an_id_and_sampling_extensions_are_accepted_in_chats():
    body = {**CHAT, "temperature": 2.0, "seed": 1, "top_k": 1, "min_p": 0.5, "request_id": "abc", "cache_salt": "z"}
    answer = ask("/v1/chat/completions", body).json()
    assert answer["id"] == "chatcmpl-abc"
    assert answer["choices"][0]["message"]["content"] == choice("chat/completions", CHAT)["message"]["content"]


# MII's endpoint and the client


def test_the_client_takes_the_options_of_the_pipeline(url):
    client: Client = local_client(url)
    options = {"max_new_tokens": 4, "ignore_eos": True, "do_sample": False}
    (biased,) = client.generate([TEXT], **options, logit_bias={40: 100})
    (pairs,) = client.generate([TEXT], **options, logit_bias=[(40, 100)])
    assert biased.token_ids == pairs.token_ids == (40,) * 4
    (echoed,) = client.generate([TEXT], **options, echo=True)
    plain = tuple(engine().encode(TEXT))
    assert echoed.token_ids[: len(plain)] == plain
    assert len(echoed.token_ids) == len(plain) + 4
    assert echoed.generated_length == 4
    (guided,) = client.generate([TEXT], max_new_tokens=9, regex="[0-9]{3}")
    assert len(guided.generated_text) == 3
    assert json.loads("1" + guided.generated_text)
    (scored,) = client.generate([TEXT], **options, prompt_logprobs=1)
    assert scored.prompt_logprobs is not None
    assert [entry.token_id for entry in scored.prompt_logprobs] == [*plain[1:]]
    assert {len(entry.top) for entry in scored.prompt_logprobs} == {1}
    client.close()


# Beam search


def search(prompt, *, width, max_tokens):
    """The same search, with the engine itself."""
    shared, beams = engine(), [((), 0.0)]
    for _ in range(max_tokens):
        found = []
        for ids, total in beams:
            request_id = shared.add([*prompt, *ids], greedy(1, logprobs=2 * width))
            (entry,) = drain(shared)[request_id][0].logprobs
            found += [((*ids, token), total + value) for token, value in entry.top.items()]
        beams = sorted(found, key=lambda beam: -beam[1])[:width]
    return [list(ids) for ids, _ in beams]


def test_beam_search_returns_the_most_likely_answers():
    body = {**COMPLETION, "use_beam_search": True, "n": 3, "max_tokens": 4, "return_token_ids": True}
    answer = ask("/v1/completions", body).json()
    prompt = engine().encode(TEXT)
    assert [c["token_ids"] for c in answer["choices"]] == search(prompt, width=3, max_tokens=4)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 12
    one = {**CHAT, "use_beam_search": True}
    assert choice("chat/completions", one)["message"] == choice("chat/completions", CHAT)["message"]
    stopped = {**body, "stop_token_ids": [answer["choices"][0]["token_ids"][1]], "length_penalty": 0.0}
    reasons = {c["finish_reason"] for c in ask("/v1/completions", stopped).json()["choices"]}
    assert "stop" in reasons
    for field in ({"stream": True}, {"stop": "x"}, {"temperature": 0.5}, {"n": 11}, {"guided_regex": "a"}, {"logprobs": 1}):
        error = ask("/v1/completions", {**body, **field}).json()["error"]
        assert error["param"] == next(iter(field)), error
    assert (
        "requires use_beam_search" in ask("/v1/completions", {**COMPLETION, "length_penalty": 2}).json()["error"]["message"]
    )
