"""POST /v1/responses and /v1/messages: the same answers as chats, in other forms."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.messages.request import MessagesRequest
from fastgen_jax.serving.messages.request import chat_of as chat_of_message
from fastgen_jax.serving.responses.items import input_items, messages_of
from fastgen_jax.serving.responses.store import ResponseStore
from tests.serving.tiny_server import MODEL, SHORT_TEMPLATE, ask, engine, with_server

GREEDY = {"temperature": 0, "ignore_eos": True}
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"c": {"enum": ["A", "B"]}}, "required": ["c"], "additionalProperties": False}


def typed_events(response):
    assert response.status_code == 200, response.text
    events = [event.split("\n") for event in response.text.split("\n\n") if event]
    for name, data in events:
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    return [json.loads(data.removeprefix("data: ")) for _, data in events]


def chat_text(**fields):
    got = ask("/v1/chat/completions", {"model": MODEL, "messages": HI, "max_tokens": 8, **GREEDY, **fields})
    return got.json()["choices"][0]["message"]["content"]


def test_a_response_has_all_the_fields_that_open_responses_requires():
    tool = {"type": "function", "name": "f", "parameters": SCHEMA}
    got = ask("/v1/responses", {"input": "Hi", "max_output_tokens": 2, "tools": [tool]}).json()
    assert got["tools"] == [{**tool, "description": None, "strict": None}]
    assert (got["top_p"], got["temperature"], got["presence_penalty"], got["frequency_penalty"]) == (1, 1, 0, 0)
    body = {"input": "Hi", "max_output_tokens": 2, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": -1}
    got = ask("/v1/responses", body).json()
    assert (got["top_p"], got["presence_penalty"], got["frequency_penalty"]) == (0.5, 1, -1)


def test_a_response_is_the_answer_of_a_chat():
    body = {"model": MODEL, "input": "Hi", "max_output_tokens": 8, **GREEDY}
    got = ask("/v1/responses", body).json()
    (item,) = got["output"]
    assert item["content"][0]["text"] == chat_text()
    assert (got["status"], got["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert got["usage"]["output_tokens"] == 8
    events = typed_events(ask("/v1/responses", {**body, "stream": True}))
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events if not e["type"].endswith("delta")]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(e["delta"] for e in events if e["type"].endswith("delta")) == item["content"][0]["text"]
    assert events[-1]["response"]["output"][0]["content"] == item["content"]


def test_reasoning_and_calls_are_items_and_go_back_as_input():
    tool = {"type": "function", "name": "f", "parameters": SCHEMA}
    body = {"model": MODEL, "input": "Hi", "max_output_tokens": 90, "thinking_budget": 4, "seed": 1, "tools": [tool]}
    body |= {"tool_choice": "required", "parallel_tool_calls": False}
    got = ask("/v1/responses", body, shared=engine(SHORT_TEMPLATE)).json()
    reasoning, call = got["output"]
    assert reasoning["content"][0]["type"] == "reasoning_text"
    assert json.loads(call["arguments"])["c"] in ("A", "B")
    assert got["usage"]["output_tokens_details"]["reasoning_tokens"] >= 4
    events = typed_events(ask("/v1/responses", {**body, "stream": True}, shared=engine(SHORT_TEMPLATE)))
    arguments = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == call["arguments"]
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "function_call"]
    items = [*input_items("Hi"), *got["output"]]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "5"}
    _, assistant, tool_message = messages_of([*items, *input_items([result])])
    assert assistant["reasoning_content"] == reasoning["content"][0]["text"]
    assert assistant["tool_calls"][0]["id"] == call["call_id"]
    assert tool_message == {"role": "tool", "tool_call_id": call["call_id"], "content": "5"}


def test_a_response_continues_a_stored_one_until_it_is_deleted():
    async def scenario(client, _):
        async def create(**fields):
            body = {"model": MODEL, "max_output_tokens": 4, **GREEDY, **fields}
            return (await client.post("/v1/responses", json=body)).json()

        first = await create(input="Hi")
        second = await create(input="x", previous_response_id=first["id"])
        said = first["output"][0]["content"][0]["text"]
        whole = await create(
            input=[*HI, {"role": "assistant", "content": said}, {"role": "user", "content": "x"}], store=False
        )
        assert second["output"][0]["content"] == whole["output"][0]["content"]
        assert second["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        assert (await client.get(f"/v1/responses/{first['id']}")).json() == first
        assert (await client.get(f"/v1/responses/{whole['id']}")).status_code == 404
        items = (await client.get(f"/v1/responses/{first['id']}/input_items")).json()
        assert [item["content"] for item in items["data"]] == [[{"type": "input_text", "text": "Hi"}]]
        count = await client.post("/v1/responses/input_tokens", json={"input": "x", "previous_response_id": first["id"]})
        assert count.json()["input_tokens"] == second["usage"]["input_tokens"]
        assert (await client.delete(f"/v1/responses/{first['id']}")).json()["deleted"]
        gone = await create(input="x", previous_response_id=first["id"])
        assert (gone["error"]["param"], gone["error"]["code"]) == ("previous_response_id", "response_not_found")

    with_server(scenario)


def test_a_summary_stands_for_a_conversation():
    async def scenario(client, _):
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        answer = await client.post("/v1/responses/compact", json={"model": MODEL, "input": said, "max_output_tokens": 4})
        assert answer.status_code == 200, answer.text
        got = answer.json()
        user, summary = got["output"]
        assert (user["content"], summary["type"]) == ("Hi", "compaction")
        assert got["usage"]["output_tokens"] <= 4
        more = {"model": MODEL, "input": [*got["output"], {"role": "user", "content": "x"}], "max_output_tokens": 2}
        assert (await client.post("/v1/responses", json=more)).status_code == 200
        nothing = await client.post("/v1/responses/compact", json={"model": MODEL})
        assert nothing.json()["error"]["param"] == "input"

    with_server(scenario, shared=engine(SHORT_TEMPLATE))


def test_the_store_drops_the_oldest_responses():
    store = ResponseStore(max_responses=3, max_bytes=1000)
    for i in range(5):
        store.add({"id": str(i), "output": [], "previous_response_id": None}, [])
    assert len(store) == 3
    with pytest.raises(ApiError, match="there is no response '1'"):
        store.get("1")
    store.add({"id": "large", "output": ["x" * 900], "previous_response_id": None}, [])
    assert len(store) == 1


@pytest.mark.parametrize(
    ("path", "fields", "ignored"),
    [
        (
            "/v1/chat/completions",
            {"messages": HI, "reasoning_effort": "low", "verbosity": "low"},
            "reasoning_effort, verbosity",
        ),
        ("/v1/chat/completions", {"messages": HI, "reasoning_effort": "none", "thinking_budget": 5}, None),
        (
            "/v1/responses",
            {"input": "Hi", "reasoning": {"effort": "high"}, "text": {"verbosity": "high"}, "stream": True},
            "reasoning_effort, verbosity",
        ),
        ("/v1/messages", {"messages": HI, "output_config": {"effort": "low"}}, "reasoning_effort"),
        (
            "/v1/messages",
            {
                "messages": HI,
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            },
            None,
        ),
    ],
)
def test_how_much_to_think_and_to_say_is_a_hint_that_some_models_ignore(path, fields, ignored):
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    answer = ask(path, {"model": MODEL, limit: 2, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-fastgen-ignored") == ignored


def test_verbosity_is_a_variable_of_the_template():
    template = SHORT_TEMPLATE.replace("a:", "{{ verbosity or '' }}a:")
    body = {"model": MODEL, "messages": HI, "max_tokens": 1, "verbosity": "low"}
    body |= {"chat_template": template}
    answer = ask("/v1/chat/completions", body, trust_request_chat_template=True)
    assert "x-fastgen-ignored" not in answer.headers
    assert answer.json()["usage"]["prompt_tokens"] == len("u:Hi\nlowa:<think>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True, "store": False}, "background"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "json_schema"}}}, None),
        ({"text": {"verbosity": "x"}}, "text"),
        ({"input": ""}, "input"),
        ({"unknown": 1}, "unknown"),
        ({"previous_response_id": "x"}, "previous_response_id"),
    ],
)
def test_what_a_response_cannot_do_is_refused_with_its_name(fields, param):
    got = ask("/v1/responses", {"model": MODEL, "input": "Hi", **fields})
    assert got.status_code in (400, 404), got.text
    if param:
        assert got.json()["error"]["param"] == param, got.text


def test_a_message_is_the_answer_of_a_chat():
    body = {"model": MODEL, "messages": HI, "max_tokens": 8, "temperature": 0, "top_k": 1}
    got = ask("/v1/messages", body).json()
    assert got["content"] == [{"type": "text", "text": chat_text(ignore_eos=False)}]
    assert got["stop_reason"] in ("max_tokens", "end_turn")
    assert got["usage"]["input_tokens"] + got["usage"]["cache_read_input_tokens"] == len("u:Hi\na:")
    assert ask("/v1/messages/count_tokens", {"model": MODEL, "messages": HI}).json() == {"input_tokens": len("u:Hi\na:")}
    events = typed_events(ask("/v1/messages", {**body, "stream": True}))
    kinds = [e["type"] for e in events if e["type"] != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert text == got["content"][0]["text"]
    stopped = ask("/v1/messages", {**body, "stop_sequences": [text[2]]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[2])
    assert stopped["content"] == [{"type": "text", "text": text[:2]}]


def test_a_message_has_thoughts_and_calls_as_blocks():
    tool = {"name": "f", "input_schema": SCHEMA}
    body = {"model": MODEL, "messages": HI, "max_tokens": 90, "tools": [tool], "seed": 1}
    body |= {"tool_choice": {"type": "tool", "name": "f"}, "thinking": {"type": "enabled", "budget_tokens": 4}}
    got = ask("/v1/messages", body, shared=engine(SHORT_TEMPLATE)).json()
    thinking, call = got["content"]
    assert thinking["type"] == "thinking"
    assert call["input"]["c"] in ("A", "B")
    assert got["stop_reason"] == "tool_use"
    events = typed_events(ask("/v1/messages", {**body, "stream": True}, shared=engine(SHORT_TEMPLATE)))
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == call["input"]
    assert "".join(d.get("thinking", "") for d in deltas) == thinking["thinking"]


def test_the_blocks_of_a_conversation_become_messages():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "s"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"c": "é"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    body = MessagesRequest(model=MODEL, max_tokens=5, system="Be brief.", messages=messages)
    system, user, assistant, result, more = chat_of_message(body).messages
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert user["content"] == [{"type": "text", "text": "Hi"}]
    assert assistant["reasoning_content"] == "Hm"
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"c": "é"}'}
    assert (result["role"], result["tool_call_id"]) == ("tool", "t1")
    assert more["content"] == [{"type": "text", "text": "and?"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text is supported"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "has type 'document'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type="),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers="),
        ({"model": "gpt"}, "is not served here"),
        ({"tool_choice": {"type": "x"}, "tools": [{"name": "f", "input_schema": {}}]}, "tool_choice.type is 'x'"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits.0.type"),
    ],
)
def test_what_a_message_cannot_do_is_refused_in_anthropics_format(fields, message):
    got = ask("/v1/messages", {"model": MODEL, "messages": HI, "max_tokens": 5, **fields})
    assert got.status_code in (400, 404)
    assert got.json()["type"] == "error"
    assert got.json()["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert message in got.json()["error"]["message"]


def test_keys_of_anthropics_clients_are_accepted_and_pings_need_none():
    async def scenario(client, _):
        body = {"model": MODEL, "messages": HI, "max_tokens": 1}
        codes = [
            (await client.post("/v1/messages", json=body, headers={"x-api-key": key})).status_code for key in ("k", "other")
        ]
        assert codes == [200, 401]
        assert (await client.get("/ping")).status_code == (await client.head("/health")).status_code == 200
        assert (await client.head("/health")).content == b""

    with_server(scenario, api_key=("k",))


def test_bodies_that_cannot_be_read_are_refused_in_the_format_of_anthropic():
    async def scenario(client, _):
        json = {"Content-Type": "application/json"}
        return [
            await client.post("/v1/messages", content=b"\x00\x00", headers=json),
            await client.post("/v1/messages", content=b" " * 2000, headers=json),
            await client.post("/v1/messages", content=b"{}", headers={"Content-Type": "text/plain"}),
            await client.get("/v1/messages/unknown"),
        ]

    responses = with_server(scenario, max_body_mb=0.001)
    assert [response.status_code for response in responses] == [400, 413, 415, 404]
    for response in responses:
        assert response.json()["type"] == "error"
        assert response.json()["error"].keys() == {"type", "message"}
