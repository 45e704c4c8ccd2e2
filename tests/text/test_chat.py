from __future__ import annotations

import json

import pytest

from fastgen_jax.text import load_tokenizer
from fastgen_jax.text.chat import ChatTemplate, render_chat
from fastgen_jax.text.gguf import load_gguf
from tests.text.vocabularies import gguf_metadata, write_json

USER = [{"role": "user", "content": "hi"}]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _render(template, messages=USER, *, tools=None, add_generation_prompt=True, **extra):
    return render_chat(
        ChatTemplate(name="default", text=template),
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        named_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        extra=extra,
    )


def test_a_template_gets_messages_special_tokens_and_extra_variables():
    assert _render(PLAIN) == "<s>user: hi\nassistant:"
    assert _render(PLAIN, add_generation_prompt=False) == "<s>user: hi\n"
    assert _render("{{ enable_thinking }} {{ documents is none }} {{ tools is none }}", enable_thinking=False) == (
        "False True True"
    )


def test_blocks_are_trimmed_loops_can_break_and_generation_marks_disappear():
    template = (
        "{% for m in messages %}\n    {% if loop.index == 2 %}\n        {% break %}\n    {% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    )
    assert _render(template, USER * 3) == "hi"


def test_json_time_and_exceptions_in_templates_work():
    assert _render("{{ tools[0] | tojson }}", tools=[{"b": "<é>", "a": 1}]) == '{"b": "<é>", "a": 1}'
    assert _render("{{ tools | tojson(indent=1) }}", tools=[{"b": 1}]) == '[\n {\n  "b": 1\n }\n]'
    assert _render("{{ strftime_now('%Y') | length }}") == "4"
    with pytest.raises(ValueError, match=r"refuses this conversation: roles must alternate$"):
        _render("{{ raise_exception('roles must alternate') }}")


def test_text_parts_are_joined_and_arguments_of_tool_calls_become_objects():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert _render("{{ messages[0].content }}", parts) == "a\nb"
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    }
    assert _render("{{ messages[0].tool_calls[0].function.arguments.x + 1 }}", [call]) == "2"
    assert call["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'  # the caller's message is unchanged


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list.*got str 'hi'"),
        ({"role": "user", "content": "x"}, "non-empty list.*got dict"),
        (["hi"], r"messages\[0\] must be a dict"),
        ([*USER, {"content": "x"}], r"messages\[1\] has role None"),
        ([{"role": "user"}], r"messages\[0\] \(user\) has no content"),
        ([{"role": "user", "content": 3}], "has content int 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "only text is supported"),
        (
            [{"role": "assistant", "content": "x", "audio": {"id": "a"}}],
            "has audio dict {'id': 'a'}, which is not supported",
        ),
        ([{"role": "assistant", "function_call": {"name": "f"}}], "use tool_calls instead"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] is dict"),
        ([{"role": "assistant", "tool_calls": "f"}], "must be a list"),
    ],
)
def test_malformed_messages_are_refused_with_their_position(messages, message):
    with pytest.raises(ValueError, match=message):
        _render(PLAIN, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "does not parse, line 1"),
        ("{{ messages[0].content + 1 }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ messages.__class__.__mro__ }}", "refuses this conversation"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses this conversation"),
    ],
)
def test_broken_and_hostile_templates_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        _render(template)


def test_malformed_tools_are_refused():
    with pytest.raises(ValueError, match="tools must be a list of JSON schemas"):
        _render(PLAIN, tools=["get_weather"])


def test_a_tokenizer_without_a_chat_template_is_reported(tokenizers):
    with pytest.raises(ValueError, match=r"no chat template; pass one as chat_template .* base model"):
        tokenizers["json"].apply_chat_template(USER)
    only_tools = load_gguf(gguf_metadata("gpt-2", **{"tokenizer.chat_template.rag": PLAIN}))
    with pytest.raises(ValueError, match="named 'default'; it has 'rag'"):
        only_tools.apply_chat_template(USER)


def test_only_the_template_adds_the_beginning_of_sequence_token():
    tokenizer = load_gguf(gguf_metadata("llama-bpe", **{"tokenizer.chat_template": PLAIN}))
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id  # plain text gets one
    ids = tokenizer.encode_chat(USER)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_templates_are_found_in_all_files_of_a_checkpoint(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = load_tokenizer(write_json(tmp_path, chat_template=named))
    assert tokenizer.apply_chat_template(USER) == "plain"
    assert tokenizer.apply_chat_template(USER, tools=[{"type": "function"}]) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools from a file")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(USER) == "from a file"
    assert tokenizer.apply_chat_template(USER, tools=[{"type": "function"}]) == "tools from a file"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert isinstance(settings["chat_template"], list)
    assert load_gguf(
        gguf_metadata("gpt-2", **{"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t"})
    ).templates == {"default": "d", "tool_use": "t"}
