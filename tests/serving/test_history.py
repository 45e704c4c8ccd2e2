"""Every endpoint with conversations accepts as history what this server and OpenAI's SDK return."""

from __future__ import annotations

import json

import openai
import pytest

from fastgen_jax.api.client import Client
from fastgen_jax.api.deployment import Deployment
from tests.serving.tiny_server import MODEL, ask, engine, tokenizer, with_server

USER = {"role": "user", "content": "Hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"c": {"$ref": "#/$defs/City"}},
            "required": ["c"],
            "additionalProperties": False,
            "$defs": {"City": {"enum": ["A", "B"]}},
        },
    },
}
RESULT = {"role": "tool", "tool_call_id": "x", "content": "warm"}
# Counts the fields of each turn: a null field must have the same effect as an omitted one.
COUNTING = (
    "{# <tool_call> tool_calls 'tool' #}{% for t in tools or () %}T:{{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}{{ m | length }}:{{ m.content }}"
    "{% for c in m.tool_calls or () %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ '\n' }}"
    "{% endfor %}"
)
TURNS = {
    "null content": {"content": None},
    "no content": {},
    "null calls": {"content": None, "tool_calls": None, "refusal": None, "function_call": None, "audio": None},
    "no calls": {"content": "yes", "tool_calls": [], "annotations": [], "reasoning_content": None},
    "with reasoning": {"content": "yes", "reasoning_content": "Let me think."},
    "cut off arguments": {
        "content": None,
        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"c": "'}}],
    },
    "arguments without end": {
        "content": None,
        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "[" * 50_000 + "]"}}],
    },
}


def local_client(url):
    return Client(Deployment(name=MODEL, model=MODEL, url=url, pid=0, started=0.0, process_start="", log=None, replicas=1))


def history(turn):
    more = [RESULT] if turn.get("tool_calls") else []
    return [USER, {"role": "assistant", **turn}, *more, USER]


@pytest.mark.parametrize("name", [name for name in TURNS if name != "arguments without end"])
def test_every_endpoint_reads_a_turn_of_the_assistant_the_same_way(url, monkeypatch, name):
    monkeypatch.setattr(engine().intake, "tokenizer", tokenizer(template=COUNTING))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        usage = sdk.chat.completions.create(model=MODEL, messages=history(TURNS[name]), max_tokens=1).usage
    client = local_client(url)
    (answer,) = client.generate([history(TURNS[name])], max_new_tokens=1)
    (output,) = client.stream(history(TURNS[name]), max_new_tokens=1)
    client.close()
    tokens = ask("/tokenize", {"messages": history(TURNS[name])}).json()["tokens"]
    assert usage.prompt_tokens == answer.prompt_length == output.num_prompt_tokens == len(tokens)
    text = tokenizer().decode(tokens)
    assert "None" not in text
    if name.startswith("null"):
        assert "assistant2:\n" in text  # role and content


def test_unparsable_arguments_are_an_error_of_the_client():
    response = ask("/v1/chat/completions", {"model": MODEL, "messages": history(TURNS["arguments without end"])})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"  # they count as text


@pytest.mark.parametrize("choice", [None, "required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_messages_returned_by_the_sdk_are_accepted_unchanged(url, choice, stream):
    options = {"model": MODEL, "max_tokens": 80, "seed": 1}
    if choice:
        options |= {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    else:  # the SDK refuses a stream that was cut off
        options |= {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["ab"]}}}}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        create = sdk.chat.completions.create
        if stream:
            with sdk.chat.completions.stream(messages=[USER], **options) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = create(messages=[USER], **options).choices[0].message
        if choice:
            assert json.loads(message.tool_calls[0].function.arguments)["c"] in ("A", "B")
        else:
            assert message.content == '"ab"'
        results = [{**RESULT, "tool_call_id": call.id} for call in message.tool_calls or ()]
        for form in (message, message.model_dump(), message.model_dump(exclude_none=True), message.to_dict()):
            again = create(messages=[USER, form, *results, USER], **options | {"max_tokens": 1})
            assert again.usage.completion_tokens == 1


def test_tokenize_counts_tools_and_template_variables(monkeypatch):
    monkeypatch.setattr(engine().intake, "tokenizer", tokenizer(template=COUNTING + "{{ word }}"))
    more = {"tools": [WEATHER], "chat_template_kwargs": {"word": "x" * 7}}
    body = {"model": MODEL, "messages": [USER]}
    counted = ask("/tokenize", {**body, **more}).json()["count"]
    assert counted == ask("/tokenize", body).json()["count"] + len("T:f\n") + 7
    chat = ask("/v1/chat/completions", {**body, **more, "max_tokens": 1, "tool_choice": "required"}).json()
    assert counted == chat["usage"]["prompt_tokens"]
    assert "require messages" in ask("/tokenize", {"prompt": "x", "tools": [WEATHER]}).json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}", "system:Be brief.\nuser:Hi\n"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{{ m.role }}:{{ m.content }}\n{% endfor %}",
            "user:Be brief.\n\nHi\n",
        ),
    ],
)
def test_developer_messages_reach_the_model_with_every_template(monkeypatch, template, prompt):
    monkeypatch.setattr(engine().intake, "tokenizer", tokenizer(template=template))
    messages = [{"role": "developer", "content": "Be brief."}, USER]

    async def scenario(client, _):
        tokens = (await client.post("/tokenize", json={"messages": messages})).json()["tokens"]
        chat = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "max_tokens": 1})
        mii = await client.post("/mii/here", json={"prompts": messages, "max_new_tokens": 1})
        assert len(tokens) == chat.json()["usage"]["prompt_tokens"] == mii.json()[0]["prompt_length"]
        return tokens

    assert tokenizer().decode(with_server(scenario)) == prompt


@pytest.mark.parametrize(
    ("template", "change", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", {}, "refuses this conversation: roles must alternate"),
        ("{{ 'x' * 10 ** 15 }}", {}, "refuses this conversation"),
        ("{% if %}", {}, "does not parse, line 1"),
        (COUNTING, {"chat_template_kwargs": {"self": 1, "template": 2}}, None),
        (COUNTING, {"chat_template_kwargs": {"messages": []}}, "pass them as fields of the request instead"),
        (COUNTING, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "start the server with --chat-template"),
        (
            COUNTING,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "the json schema cannot be used: no token can follow",
        ),
        (
            COUNTING,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "("}}}},
            "unclosed group",
        ),
        (
            COUNTING,
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "oops"}}}],
                "tool_choice": "required",
            },
            "the json schema cannot be used",
        ),
        (COUNTING, {"messages": [{"role": "user", "content": [[[]]]}]}, "only text is supported"),
    ],
)
def test_limits_of_templates_and_grammars_are_errors_of_the_client(monkeypatch, template, change, message):
    monkeypatch.setattr(engine().intake, "tokenizer", tokenizer(template=template))
    response = ask("/v1/chat/completions", {"model": MODEL, "messages": [USER], "max_tokens": 1, **change})
    assert response.status_code == (400 if message else 200), response.text
    if message:
        assert message in response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_template_of_the_operator_serves_all_conversations(monkeypatch):
    own = "own {{ messages[-1].content }}"
    monkeypatch.setattr(engine().intake, "tokenizer", tokenizer().with_template(own))

    async def scenario(client, _):
        info = (await client.get("/tokenizer_info")).json()
        tokens = (await client.post("/tokenize", json={"messages": [USER]})).json()["tokens"]
        return info["chat_template"], tokenizer().decode(tokens)

    assert with_server(scenario) == (own, f"own {USER['content']}")
