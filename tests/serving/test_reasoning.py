"""Reasoning in chats: separated from the answer, limited, switched by the template; and calls forced in each format."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.serving.tool_formats import FORMATS
from tests.serving.tiny_server import MODEL, ask, events

TEMPLATE = (
    "{# </think> #}{% if tools %}t{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
    "{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
)
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "temperature": 0}
SCHEMA = {"type": "object", "properties": {"c": {"enum": ["A", "B"]}}, "required": ["c"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def post(template=TEMPLATE, *, tool_format=None, **fields):
    config = {"trust_request_chat_template": True, "tool_format": tool_format}
    return ask("/v1/chat/completions", {**CHAT, **fields, "chat_template": template}, **config)


def chat(**fields):
    response = post(**fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_budget_ends_the_reasoning_and_the_rest_is_the_answer():
    got = chat(thinking_budget=5, ignore_eos=True)
    message = got["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"]
    assert 0 < len(message["reasoning"]) <= 5
    assert len(message["content"]) == 40 - 5 - len("\n</think>\n\n")
    assert got["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 5
    got = events(post(thinking_token_budget=5, ignore_eos=True, stream=True))
    deltas = [e["choices"][0]["delta"] for e in got]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == message["reasoning"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    hidden = chat(thinking_budget=5, ignore_eos=True, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning" not in hidden
    assert hidden["content"] == message["content"]


def test_without_a_budget_the_text_before_the_closing_tag_is_reasoning():
    message = chat(ignore_eos=True)["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning"]


def test_a_schema_holds_for_what_follows_the_reasoning():
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    message = chat(thinking_budget=3, response_format=form)["choices"][0]["message"]
    assert json.loads(message["content"])["c"] in ("A", "B")
    assert message["reasoning"]
    got = chat(thinking_budget=0, tools=[TOOL], tool_choice="required", max_tokens=90)["choices"][0]
    assert got["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert got["finish_reason"] == "tool_calls"


def test_the_effort_reaches_the_template():
    message = chat(reasoning_effort="none", ignore_eos=True)["choices"][0]["message"]
    assert "reasoning" not in message
    assert message["content"]
    low = chat(reasoning_effort="low")["usage"]["prompt_tokens"]
    assert low == chat()["usage"]["prompt_tokens"] + len("low")
    assert chat(chat_template_kwargs={"enable_thinking": False})["choices"][0]["message"]["content"]
    ignored = ask("/v1/chat/completions", {**CHAT, "reasoning_effort": "high", "thinking_budget": 4})
    assert ignored.headers["x-fastgen-ignored"] == "reasoning_effort"


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"deepseek-v3", "deepseek-v3.1"}))
def test_a_required_call_is_written_in_the_format_of_the_model(name):
    parameters = {
        "type": "object",
        "properties": {"c": {"enum": ["A", "B"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["c", "n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    fields = {"max_tokens": 200, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    response = post("{{ tools | length }}a:", tool_format=name, **fields)
    (got,) = response.json()["choices"]
    (call,) = got["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"c", "n"}
    assert arguments["c"] in ("A", "B")
    assert arguments["n"] in range(1, 10)
    assert not got["message"]["content"]
    assert got["finish_reason"] == "tool_calls"


def test_a_string_of_a_forced_call_without_quotes_ends_at_its_tag():
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"]},
        },
    }
    fields = {"max_tokens": 150, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    for name in ("qwen3-coder", "glm"):
        response = post("{{ tools | length }}a:", tool_format=name, **fields)
        (call,) = response.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["arguments"].startswith('{"t": "')
