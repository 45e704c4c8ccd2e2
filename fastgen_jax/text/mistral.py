"""Mistral's conversation formats, for checkpoints that come with tekken.json and no chat template.

tekken.json names the version of the format. Source: the encoders of mistral-common, with which the tests compare.
"""

from __future__ import annotations

from string import Template

FORMATS = ("v3", "v7", "v11", "v13", "v15")

# Texts that a user's or an assistant's content has in any version: a string, or parts.
_TEXT = """
{%- macro text(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for part in content if part.text %}{{- '' if loop.first else $part_separator }}{{- part.text }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
"""

# Several messages of a user in a row are one turn. The tools are described before the last turn, from version 13 on before
# the first one.
_TOOLS = """
{%- set ns = namespace(tools_at=-1, tools=[], system=[]) %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system + [text(message.content)] %}
{%- endfor %}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list if $system_in_user else messages %}
{%- for message in turns %}
    {%- if message.role == 'user' and (loop.first or loop.previtem.role != 'user') and (ns.tools_at < 0 or $last) %}
        {%- set ns.tools_at = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for tool in tools or [] %}
    {%- set function = {'name': tool.function.name, 'description': tool.function.description or '',
        'parameters': tool.function.parameters or {}} %}
    {%- set ns.tools = ns.tools + [{'type': 'function', 'function': function}] %}
{%- endfor %}
"""

_TURNS = """
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if loop.first or loop.previtem.role != 'user' %}
            {%- if loop.index0 == ns.tools_at and ns.tools %}
                {{- '[AVAILABLE_TOOLS]' + ns.tools | tojson + '[/AVAILABLE_TOOLS]' }}
            {%- endif %}
            {%- if loop.index0 == ns.tools_at %}$settings{% endif %}
            {{- '[INST]' }}
            {%- if $system_in_user and loop.index0 == ns.tools_at and ns.system %}
                {{- ns.system | join('\\n\\n') + '\\n\\n' }}
            {%- endif %}
        {%- else %}
            {{- '\\n\\n' }}
        {%- endif %}
        {{- text(message.content) }}
        {%- if loop.last or loop.nextitem.role != 'user' %}{{- '[/INST]' }}{%- endif %}
    {%- elif message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' + text(message.content) + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'assistant' %}
        {%- set ns.calls = [] %}
        $answer
        {{- eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if not message.tool_call_id %}{{- raise_exception('a tool message requires its tool_call_id') }}{%- endif %}
        {{- '[TOOL_RESULTS]' }}
        {%- set result = text(message.content) %}
        $result
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('roles are system, user, assistant and tool, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
"""

_CONTENT = "{{- text(message.content or '').rstrip(' ') }}"
_REASONING = """
        {%- if message.reasoning_content %}
            {{- '[THINK]' + message.reasoning_content + '[/THINK]' + text(message.content or '') }}
        {%- else %}
            {{- text(message.content or '').rstrip(' ') }}
        {%- endif %}
"""
_CALLS_IN_A_LIST = """
        {%- for call in message.tool_calls or [] %}
            {%- set function = {'name': call.function.name, 'arguments': call.function.arguments} %}
            {%- set ns.calls = ns.calls + [dict(function, id=call.id) if call.id else function] %}
        {%- endfor %}
        {%- if ns.calls %}{{- '[TOOL_CALLS]' + ns.calls | tojson }}{%- endif %}
"""
_CALLS = """
        {%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name $call_id + '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
"""
_RESULT_AS_JSON = """
        {%- set is_json = (result[:1] + result[-1:]) in ('{}', '[]') %}
        {{- '{"content": ' + (result if is_json else result | tojson) }}
        {{- ', "call_id": ' + message.tool_call_id | tojson + '}' }}
"""
_RESULT_WITH_ID = "{{- message.tool_call_id + '[TOOL_CONTENT]' + result }}"
_SETTINGS = """
                {%- set effort = reasoning_effort | default(none) or $default_effort %}
                {%- if effort %}
                    {{- '[MODEL_SETTINGS]' + {'reasoning_effort': effort} | tojson + '[/MODEL_SETTINGS]' }}
                {%- endif %}
                """


def conversation_template(version: str, *, reasoning_effort: str | None = None) -> str:
    """Returns a chat template that renders one of `FORMATS`.

    `reasoning_effort` is the default for the variable of the same name, which "v15" reads.
    """
    number = int(version[1:])
    calls = Template(_CALLS).substitute(call_id="+ '[CALL_ID]' + call.id" if number == 11 else "")
    settings = Template(_SETTINGS).substitute(default_effort=repr(reasoning_effort or ""))
    results = {"v3": _RESULT_AS_JSON, "v7": _RESULT_WITH_ID, "v11": _RESULT_WITH_ID}
    filled = Template(_TEXT + _TOOLS + _TURNS).substitute(
        part_separator="'\\n\\n'" if number < 15 else "''",
        system_in_user="true" if number < 7 else "false",
        last="true" if number < 13 else "false",
        settings=settings if number >= 15 else "",
        answer=(_REASONING if number >= 13 else _CONTENT) + (calls if number >= 11 else _CALLS_IN_A_LIST),
        result=results.get(version, "{{- result }}"),
    )
    return filled.strip()
