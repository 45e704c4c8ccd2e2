"""Tokenizers and chat templates beside transformers 5.15: `tests/reference/text.json`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.chat import ChatTemplate, render_chat
from tests.reference.conversations import CALL, CALLS, CONVERSATIONS, RESULT, SYSTEM, TEMPLATES, THOUGHT, USER, WEATHER

REFERENCE = Path(__file__).parents[1] / "reference" / "text.json"
NAMED_TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}  # of the tokenizer that rendered the reference


@functools.cache
def reference() -> dict[str, Any]:
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def _tokenizers() -> list[str]:
    return [case["name"] for case in reference()["tokenizers"]]


def write(folder: Path, files: dict[str, Any]) -> Path:
    """A directory with these files; without tokenizer.json, also vocab.json and merges.txt."""
    if "tokenizer.json" not in files:
        (folder / "vocab.json").write_text(json.dumps(reference()["vocab"]), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *reference()["merges"], ""]), encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", _tokenizers())
def test_token_ids_and_texts_are_those_of_transformers(tmp_path, name):
    case = next(case for case in reference()["tokenizers"] if case["name"] == name)
    tokenizer = load_tokenizer(write(tmp_path, case["files"]))
    texts = reference()["texts"]
    assert [tokenizer.encode(text) for text in texts] == case["ids"]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == case["plain"]
    assert [tokenizer.decode(ids) for ids in case["ids"]] == case["visible"]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in case["ids"]] == case["whole"]
    assert tokenizer.named_tokens.get("bos_token") == case["bos"]
    assert tokenizer.named_tokens.get("eos_token") == case["eos"]


def render(template: str, *messages: dict[str, Any], tools=None, **extra: Any) -> str:
    return render_chat(
        ChatTemplate(name="default", text=TEMPLATES[template][0]),
        messages,
        add_generation_prompt=True,
        tools=tools,
        named_tokens=NAMED_TOKENS,
        extra=extra,
    )


@pytest.mark.parametrize(
    ("template", "conversation"), [(name, key) for name, (_, keys) in TEMPLATES.items() for key in keys]
)
def test_conversations_are_rendered_as_in_transformers(template, conversation):
    given = CONVERSATIONS[conversation]
    (expected,) = (
        case["text"] for case in reference()["chats"] if (case["template"], case["conversation"]) == (template, conversation)
    )
    assert render(template, *given["messages"], tools=given.get("tools"), **given.get("extra", {})) == expected


def _json(arguments: object) -> dict[str, Any]:
    """The call with arguments as text, as servers return it."""
    return {**CALL, "function": {**CALL["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}


ARGUMENTS = CALL["function"]["arguments"]
EMPTY = {"refusal": None, "audio": None, "function_call": None, "annotations": None, "reasoning_content": None}
AS_SERVED = {**CALLS, **EMPTY, "content": None, "tool_calls": [_json(ARGUMENTS)]}


@pytest.mark.parametrize("template", ["llama3", "mistral", "qwen3"])
@pytest.mark.parametrize("calls", [AS_SERVED, {**CALLS, "content": None}, {**AS_SERVED, "content": ""}])
def test_calls_as_servers_return_them_are_rendered_like_objects(template, calls):
    expected = render(template, SYSTEM, USER, CALLS, RESULT, tools=[WEATHER])
    assert '"city": "Köln"' in expected
    assert render(template, SYSTEM, USER, calls, RESULT, tools=[WEATHER]) == expected


@pytest.mark.parametrize("calls", [None, []])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if "turns" in TEMPLATES[name][1]])
def test_no_calls_are_the_same_as_none(template, calls):
    messages = [CONVERSATIONS["turns"]["messages"], []]
    expected = render(template, *messages[0])
    served = [{**m, **EMPTY, "tool_calls": calls} if m["role"] == "assistant" else m for m in messages[0]]
    assert render(template, *served) == expected


def test_a_template_that_joins_arguments_with_text_gets_their_json():
    written = '{"city": "Köln",  "days": [1]}'  # as the model wrote it
    call = {**CALL, "function": {"name": "weather", "arguments": written}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert f"```json\n{written}\n```" in render("deepseek", USER, message)
    assert f"```json\n{json.dumps(ARGUMENTS, ensure_ascii=False)}\n```" in render(
        "deepseek", USER, {**CALLS, "content": None}
    )


@pytest.mark.parametrize("template", ["llama3", "mistral", "qwen3"])
@pytest.mark.parametrize("arguments", ["null", "", None, "{}"])
def test_a_call_without_arguments_has_an_empty_object(template, arguments):
    bare = {**CALLS, "tool_calls": [{**CALL, "function": {"name": "now", "arguments": arguments}}]}
    empty = {**CALLS, "tool_calls": [{**CALL, "function": {"name": "now", "arguments": {}}}]}
    text = render(template, USER, bare, RESULT, tools=[WEATHER])
    assert text == render(template, USER, empty, RESULT, tools=[WEATHER])
    assert "{}" in text
    assert "null" not in text


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_name_that_a_template_reads(name):
    message = {"role": "assistant", "content": "4", name: "Add the two."}
    assert render("qwen3", USER, message, USER) == render("qwen3", USER, THOUGHT, USER)
    reads = "{% for m in messages %}{{ m.content }}{% if 'NAME' in m %}<{{ m.NAME }}>{% endif %}{% endfor %}"
    for other in ("reasoning_content", "reasoning", "thinking"):
        assert _plain(reads.replace("NAME", other), USER, message) == f"{USER['content']}4<Add the two.>"
    assert _plain("{{ messages[1].reasoning or messages[1].reasoning_content }}", USER, message) == "Add the two."
    assert _plain("{{ messages[1].content }}{{ thinking }}", USER, message) == "4"  # a variable of that name
    as_part = (
        "{% for p in messages[1].content %}{% if p.type == 'thinking' %}<{{ p.thinking }}>{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}"
    )
    assert _plain(as_part, USER, message) == "<Add the two.>4"


def _plain(template: str, *messages: dict[str, Any]) -> str:
    chat = ChatTemplate(name="default", text=template)
    return render_chat(chat, messages, add_generation_prompt=False, tools=None, named_tokens={}, extra={})


def test_reasoning_in_parts_of_a_content_is_read_as_well():
    message = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Add the two."}]},
            {"type": "text", "text": "4"},
        ],
    }
    assert render("qwen3", USER, message, USER) == render("qwen3", USER, THOUGHT, USER)
    assert _plain("{{ messages[0].content }}", message) == "4"


TWO = [{"type": "text", "text": " one"}, {"type": "text", "text": "two "}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}", " one\ntwo "),
        ("{{ messages[0]['content'].split('\n')[0] }}", " one"),
        ("{% for part in messages[0].content %}<{{ part.text }}>{% endfor %}", "< one><two >"),
        ("{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}", " onetwo "),
        ("{% set c = messages[0].get('content') %}{% for part in c or [] %}{{ part.text | trim }}{% endfor %}", "onetwo"),
        (
            "{% macro f(x, y) %}{% for p in y %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(1, messages[0].content) }}",
            " onetwo ",
        ),
        ("{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(x=messages[0].content[1:]) }}", "two "),
        ("{{ messages[0].content | map(attribute='text') | join('+') }}", " one+two "),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools or [] %}{% endfor %}", " one\ntwo "),
        # It loops over the content of other messages only.
        (
            "{% set m = messages[0] %}{% if m.role == 'tool' %}{% for p in m.content %}{% endfor %}"
            "{% else %}{{ m.content }}{% endif %}",
            " one\ntwo ",
        ),
    ],
)
def test_text_parts_are_joined_unless_a_template_loops_over_them(template, expected):
    assert _plain(template, {"role": "user", "content": TWO}) == expected


def test_a_template_that_only_loops_over_parts_gets_text_as_one_part():
    answer = {"role": "assistant", "content": "Cold."}
    assert render("only_parts", USER, answer) == f"User:{USER['content']}Assistant:{answer['content']}"
    assert render("parts", USER) == render("parts", {**USER, "content": [USER["content"]]})
    first = "{% for m in messages %}{{ m.content[0].type }}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert _plain(first, {"role": "assistant", "content": ""}, USER) == f"text<>text<{USER['content']}>"


def test_the_parts_of_a_system_message_are_joined_if_only_those_of_turns_are_read():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]{% elif m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": TWO}, {"role": "user", "content": TWO}]
    assert _plain(template, *messages) == "[ one\ntwo ]< one><two >"


def test_developer_messages_in_parts_keep_their_text():
    developer = {"role": "developer", "content": TWO}
    system = "{% for m in messages %}{{ m.role }}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert _plain(system, developer, USER) == f"system< one><two >user<{USER['content']}>"
    assert _plain(system, SYSTEM, developer, USER) == f"system<{SYSTEM['content']}><\n\n>< one><two >user<{USER['content']}>"
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert _plain(users, developer, USER) == f" one\ntwo \n\n{USER['content']}"


def test_a_tool_that_returns_nothing_has_an_empty_result():
    for nothing in ({}, {"content": None}, {"content": ""}, {"content": []}):
        text = render("qwen3", USER, CALLS, {"role": "tool", "tool_call_id": "abcdefgh1", **nothing})
        assert "<tool_response>\n\n</tool_response>" in text
