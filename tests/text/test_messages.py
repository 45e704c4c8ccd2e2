"""Conversations as clients send them, rendered by templates like those of real checkpoints."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.text.chat import ChatTemplate, render_chat

USER = {"role": "user", "content": "hi"}
ANY_ROLE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
# The part of Llama 3.1's template for calls: it tests whether the field exists, then its length.
LLAMA = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('only single tool-calls') }}{% endif %}"
    "{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})\n"
    "{% elif m.role == 'tool' %}ipython:{{ m.content }}\n{% else %}{{ m.role }}:{{ m.content }}\n{% endif %}"
    "{% endfor %}"
)
# Some templates iterate over the names of the arguments.
BY_NAME = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}{{ '\n' }}{% endfor %}"
)
# DeepSeek's template tests whether the content is none.
ASKS_NONE = (
    "{% for m in messages %}{% if m['content'] is none %}calls {{ m.tool_calls[0].function.name }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Like the first templates of Gemma and Mistral.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}\n{% endfor %}"
)
DROPS_OTHERS = (
    "{% for m in messages %}{% if m.role == 'user' %}u:{{ m.content }}\n{% elif m.role == 'assistant' %}"
    "a:{{ m.content }}\n{% endif %}{% endfor %}"
)
EMPTY = {"tool_calls": None, "refusal": None, "function_call": None, "audio": None, "annotations": [], "name": None}


def render(template, *messages):
    return render_chat(
        ChatTemplate(name="default", text=template),
        messages,
        add_generation_prompt=False,
        tools=None,
        named_tokens={},
        extra={},
    )


def call(arguments, **more):
    return {
        "role": "assistant",
        "content": None,
        **more,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


@pytest.mark.parametrize("template", [ANY_ROLE, LLAMA, BY_NAME, ASKS_NONE, NO_SYSTEM, DROPS_OTHERS])
@pytest.mark.parametrize("calls", [None, []])
def test_null_fields_and_an_empty_list_of_calls_have_no_effect(template, calls):
    plain = render(template, USER, {"role": "assistant", "content": "yes"}, USER)
    assert render(template, USER, {"role": "assistant", "content": "yes", **EMPTY, "tool_calls": calls}, USER) == plain


@pytest.mark.parametrize("template", [ANY_ROLE, LLAMA, BY_NAME, ASKS_NONE, NO_SYSTEM, DROPS_OTHERS])
@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": None, **EMPTY}, {"content": None, "tool_calls": []}])
def test_an_assistant_message_without_content_is_an_empty_turn(template, message):
    assert render(template, USER, {"role": "assistant", **message}, USER) == render(
        template, USER, {"role": "assistant", "content": ""}, USER
    )


def test_a_refusal_counts_as_content():
    for said in ({"content": None, "refusal": "I cannot."}, {"content": [{"type": "refusal", "refusal": "I cannot."}]}):
        assert render(ANY_ROLE, USER, {"role": "assistant", **said}) == "<user>hi\n<assistant>I cannot.\n"


def test_null_content_with_calls_is_rendered_as_each_template_expects():
    assert render(ASKS_NONE, USER, call("{}")) == "hi\ncalls f\n"
    assert render(BY_NAME, USER, call('{"x": 1}')) == "hi\nf x=1\n"
    assert render(LLAMA, USER, call('{"x": 1}')) == 'user:hi\nf({"x": 1})\n'


@pytest.mark.parametrize("arguments", ['{"x": ', "not JSON", "[" * 100_000, "1" * 5000])
def test_arguments_that_are_not_json_reach_the_template_unchanged(arguments):
    assert json.loads(render(LLAMA, USER, call(arguments)).split("f(")[1].rstrip(")\n")) == arguments
    assert render(BY_NAME, USER, call(arguments)) == f"hi\nf arguments={arguments}\n"
    assert render(ANY_ROLE, USER, call(arguments)).endswith(
        f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>\n'
    )


@pytest.mark.parametrize("arguments", ["", "null", None])
def test_a_call_without_arguments_gets_an_empty_object(arguments):
    assert render(LLAMA, USER, call(arguments)) == "user:hi\nf({})\n"


def test_calls_and_results_become_text_if_the_template_does_not_support_them():
    result = {"role": "tool", "tool_call_id": "c", "content": "4"}
    assert render(ANY_ROLE, USER, call('{"x": "é"}', content="Let me see."), result, result) == (
        '<user>hi\n<assistant>Let me see.\n<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call>\n'
        "<user><tool_response>\n4\n</tool_response>\n<tool_response>\n4\n</tool_response>\n"
    )
    assert "</tool_response>" in render(NO_SYSTEM, USER, call("{}"), result)
    assert render(LLAMA, USER, call("{}"), result).endswith("ipython:4\n")  # this template supports them


def test_results_keep_their_role_if_a_template_with_tools_prints_any_role():
    result = {"role": "tool", "tool_call_id": "c", "content": "4"}
    with_tools = "{% if tools %}{{ tools }}{% endif %}"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    any_role = f"{with_tools}{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{calls}{{% endfor %}}"
    assert render(any_role, USER, call("{}"), result) == "<user>hi<assistant>f<tool>4"
    assert "<tool_response>\n4\n</tool_response>" in render(with_tools + DROPS_OTHERS, USER, call("{}"), result)
    assert "<tool_response>\n4\n</tool_response>" in render(with_tools + NO_SYSTEM, USER, call("{}"), result)


def test_null_content_becomes_empty_if_the_test_for_it_does_not_help():
    template = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is none %}{% elif m.content | length > 1 %}"
        "{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    )
    assert render(template, USER, call("{}")) == "hif"


def test_a_developer_message_becomes_a_system_message_if_the_role_is_unknown():
    developer, system = {"role": "developer", "content": "Be brief."}, {"role": "system", "content": "You are B."}
    assert render(ANY_ROLE, developer, USER) == "<system>Be brief.\n<user>hi\n"
    assert render(ANY_ROLE, system, developer, USER) == "<system>You are B.\n\nBe brief.\n<user>hi\n"
    knows = "{# developer #}" + ANY_ROLE
    assert render(knows, developer, USER) == "<developer>Be brief.\n<user>hi\n"


@pytest.mark.parametrize(("template", "user"), [(NO_SYSTEM, "user"), (DROPS_OTHERS, "u")])
def test_without_a_system_role_a_developer_message_becomes_part_of_the_users(template, user):
    developer = {"role": "developer", "content": "Be brief."}
    assert render(template, developer, USER) == f"{user}:Be brief.\n\nhi\n"
    assert render(template, developer) == f"{user}:Be brief.\n"
    answer = {"role": "assistant", "content": "yes"}
    later = render(template, USER, answer, developer, USER).splitlines()
    assert later[2:] == [f"{user}:Be brief.", "", "hi"]
    if template is NO_SYSTEM:
        with pytest.raises(ValueError, match="System role not supported"):  # an explicit system message is refused
            render(template, {"role": "system", "content": "Be brief."}, USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 15 }}",
        "{{ messages | map(attribute=1.5) | list | tojson }}",
        "{{ 1 // 0 }}",
        "{% if %}",
        "{{ messages[9].content.x }}",
        "{{ [].pop() }}",
        "{{ strftime_now(3) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_every_exception_of_a_template_is_reported_as_its_refusal(template):
    with pytest.raises(ValueError, match=r"the chat template 'default' (refuses this conversation|does not parse)"):
        render(template, USER)
