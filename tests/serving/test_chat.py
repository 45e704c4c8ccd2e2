"""POST /v1/chat/completions: templates, log-probabilities, JSON by grammar, tool calls."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.serving.chat import AnswerForm
from fastgen_jax.serving.protocol import ChatRequest
from fastgen_jax.serving.tool_formats import FORMATS
from fastgen_jax.serving.tools import prepare_messages
from tests.serving.tiny_server import MODEL, ask, events, offline, tokenizer

CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"c": {"enum": ["A", "B"]}},
            "required": ["c"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def choice(body):
    response = ask("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def joined(got, part="content"):
    return "".join(e["choices"][0]["delta"].get(part) or "" for e in got if e["choices"])


def test_a_chat_is_the_completion_of_its_rendered_template():
    got = choice(CHAT)
    # The template writes its own special tokens, so none are added: compare token ids.
    ids = tokenizer().encode("u:Hi\na:", add_special_tokens=False)
    assert got["message"] == {
        "role": "assistant",
        "refusal": None,
        "content": offline(ids, do_sample=False, max_new_tokens=8, ignore_eos=True),
    }
    streamed = events(ask("/v1/chat/completions", {**CHAT, "stream": True}))
    assert joined(streamed) == got["message"]["content"]
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert streamed[0]["object"] == "chat.completion.chunk"


def test_logprobs_come_with_bytes_and_alternatives():
    content = choice({**CHAT, "logprobs": True, "top_logprobs": 3})["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert entry["token"] == entry["top_logprobs"][0]["token"]  # greedy decoding takes the most likely token
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_the_sampled_token_is_among_the_alternatives_even_if_it_is_unlikely():
    sampled = {**CHAT, "temperature": 2.0, "seed": 5, "max_tokens": 20, "logprobs": True}
    unlikely = 0
    for number in (1, 3):
        for entry in choice({**sampled, "top_logprobs": number})["logprobs"]["content"]:
            own = [top for top in entry["top_logprobs"] if top["token"] == entry["token"]]
            assert own == [{name: entry[name] for name in ("token", "logprob", "bytes")}]
            assert len(entry["top_logprobs"]) in (number, number + 1)
            unlikely += len(entry["top_logprobs"]) > number
    assert unlikely
    assert all(entry["top_logprobs"] == [] for entry in choice(sampled)["logprobs"]["content"])


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 4}])
def test_answers_follow_a_schema(sampling):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    body = {**CHAT, **sampling, "max_tokens": 60, "response_format": form, "logit_bias": {}}
    got = choice(body)
    answer = json.loads(got["message"]["content"])
    assert set(answer) == {"a", "b"}
    assert answer["b"] in "xy"
    assert 0 <= answer["a"] <= 9
    assert got["finish_reason"] == "stop"
    assert joined(events(ask("/v1/chat/completions", {**body, "stream": True}))) == got["message"]["content"]


def test_completions_and_json_objects_follow_the_grammar_too():
    body = {"model": MODEL, "prompt": "x", "max_tokens": 40, "temperature": 0, "response_format": {"type": "json_object"}}
    text = ask("/v1/completions", body).json()["choices"][0]["text"]
    assert text.startswith("{")


def test_a_named_function_is_called_with_arguments_that_follow_its_schema():
    body = {**CHAT, "max_tokens": 90, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    got = choice(body)
    (call,) = got["message"]["tool_calls"]
    assert got["message"]["content"] is None
    assert got["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"])["c"] in ("A", "B")
    deltas = [
        c
        for e in events(ask("/v1/chat/completions", {**body, "stream": True}))
        for c in e["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
    assert [d["function"].get("name") for d in deltas] == ["f"] + [None] * (len(deltas) - 1)


def test_a_required_call_chooses_one_of_the_tools():
    other = {"type": "function", "function": {"name": "g", "parameters": WEATHER["function"]["parameters"]}}
    got = choice({**CHAT, "max_tokens": 60, "tools": [other], "tool_choice": "required"})
    (call,) = got["message"]["tool_calls"]
    assert call["function"]["name"] == "g"
    assert json.loads(call["function"]["arguments"])["c"] in ("A", "B")


def pieces_of(text, size):
    """The pieces of an answer of a model that writes <tool_call>, which arrives in pieces of `size` characters."""
    reader = AnswerForm(schemas={}, tools=FORMATS["hermes"], reasoning=None).reader()
    pieces = [piece for i in range(0, len(text), size) for piece in reader.push(text[i : i + size])]
    return pieces + reader.flush()


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content"),
    [
        *(
            (text, text)
            for text in (
                "plain",
                "a < b",
                "ends with <tool",
                "<tool_call>cut off",
                'a <tool_call>{"name": }</tool_call> b',
                '<tool_call>["f"]</tool_call>',
                '<tool_call>{"name": 5}</tool_call>',
                f"<tool_call>{'[' * 100_000}</tool_call>",
                '<tool_call>\n{"name": "f", "arg',
                "<tool_call></tool_call>",
                "</tool_call>",
            )
        ),
        (f"a {CALL}", "a "),
        (f"{CALL}\n{CALL}\n", ""),
        (f"a {CALL}\n\n{CALL}\n b\n", "a \n b\n"),
        (f"{CALL}<tool_call>cut off", "<tool_call>cut off"),
        (f"{CALL}\n<tool_call>{{}}</tool_call>\n{CALL}", "\n<tool_call>{}</tool_call>\n"),
        (f"{CALL}<tool", "<tool"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1_000_000])
def test_everything_that_is_not_a_call_is_content(text, content, size):
    pieces = pieces_of(text, max(size, len(text) // 1000))
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == content
    assert sum(piece.kind == "call" for piece in pieces) == text.count(CALL)


@pytest.mark.parametrize("said", ['Wait. <tool_call>{"name": "f", </tool_call>', '<tool_call>{"name": "f", "arg'])
def test_an_unreadable_call_stays_in_the_answer(said):
    # The grammar forces the model to write it.
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": [said.replace('"', "'")]}}}
    body = {**CHAT, "max_tokens": 80, "tools": [WEATHER], "response_format": form}
    got = choice(body)
    assert json.loads(got["message"]["content"]) == said.replace('"', "'")
    assert "tool_calls" not in got["message"]
    assert got["finish_reason"] == "stop"
    assert joined(events(ask("/v1/chat/completions", {**body, "stream": True}))) == got["message"]["content"]


def test_arguments_that_the_model_wrote_as_a_string_stay_unchanged():
    call, arguments = pieces_of('<tool_call>{"name": "f", "arguments": "{\\"c\\": 1}"}</tool_call>', 1000)
    assert (call.text, arguments.text) == ("f", '{"c": 1}')


def test_references_inside_a_tools_schema_are_resolved():
    parameters = {
        "type": "object",
        "properties": {"c": {"$ref": "#/$defs/C"}, "d": {"const": {"$ref": "#/x"}}},
        "required": ["c", "d"],
        "additionalProperties": False,
        "$defs": {"C": {"enum": ["A"]}},
    }
    other = {"type": "function", "function": {"name": "g", "parameters": parameters}}
    got = choice({**CHAT, "max_tokens": 90, "tools": [other], "tool_choice": "required"})
    (call,) = got["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"c": "A", "d": {"$ref": "#/x"}}


def test_tools_are_described_in_a_message_if_the_template_has_none():
    plain = tokenizer(template="{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}")
    body = ChatRequest(model=MODEL, messages=[{"role": "user", "content": "x"}], tools=[WEATHER])
    messages, tools = prepare_messages(plain, body.messages, body.tools)
    assert tools is None
    prompt = plain.apply_chat_template(messages)
    assert prompt.startswith("system:You may call functions.")
    assert '"name": "f"' in prompt
    assert prompt.endswith("\nuser:x\n")
    with_system, _ = prepare_messages(plain, [{"role": "system", "content": "Be brief."}, *body.messages], body.tools)
    assert plain.apply_chat_template(with_system).startswith("system:Be brief.\n\nYou may call functions.")


def test_a_template_with_an_unknown_format_of_tool_calls_is_refused_with_tool_choice_auto():
    body = {**CHAT, "tools": [WEATHER], "chat_template": "{{ tools | length }}"}
    got = ask("/v1/chat/completions", body, trust_request_chat_template=True)
    assert got.status_code == 400
    assert "in a format that this server cannot read" in got.json()["error"]["message"]
    assert got.json()["error"]["param"] == "tool_choice"
    assert ask("/v1/chat/completions", body, trust_request_chat_template=True, tool_format="llama").status_code == 200
    forced = ask(
        "/v1/chat/completions", {**body, "tool_choice": "required", "max_tokens": 90}, trust_request_chat_template=True
    )
    assert forced.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
