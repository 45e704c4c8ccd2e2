"""Conversations: validating the messages of any client or server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fastgen_jax.json_types import JsonFields, JsonObject

Message = JsonObject  # checked
Content = str | list[JsonObject] | None  # text, its parts as {"type": "text", "text": ...}, or nothing beside calls

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which servers return, and templates read, an assistant's reasoning; the most common one first."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class Arguments(dict[str, object]):
    """The arguments of a call: an object for templates that read it, JSON for those that print it.

    Templates were written for either form: some convert an object to JSON or iterate over its names, others join the JSON
    of OpenAI's protocol with other text.
    """

    def __init__(self, fields: Mapping[str, object], text: str | None = None) -> None:
        super().__init__(fields)
        self._text = text

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self._text is None else self._text

    def __add__(self, after: object) -> str:
        return str(self) + str(after)

    def __radd__(self, before: object) -> str:
        return str(before) + str(self)


def short(value: object) -> str:
    """Returns a value as error messages show it: its type and at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with too many digits, or a list nested too deeply
        return f"a {type(value).__name__}"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def checked_messages(messages: Sequence[JsonFields]) -> list[Message]:
    """Returns the messages without empty fields; ValueError names a malformed message and what is wrong.

    A list of text parts keeps only types and texts. Arguments of tool calls become `Arguments` if they are an object, or
    JSON text of one; other text stays as the model wrote it. Null fields and an empty list of calls are removed, because
    templates test whether a field exists. An assistant's message without content and calls gets the content "". Parts with
    reasoning become the field "reasoning_content".
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role': ..., 'content': ...}}, got {short(messages)}")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def text_of(content: Content) -> str:
    """The text of a content; parts are joined by newlines."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _checked_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {short(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} has role {role!r}; it must be a string such as 'system', 'user' or 'assistant'")
    for name, remedy in (("audio", "pass its text as content"), ("function_call", "use tool_calls instead")):
        if message.get(name) is not None:
            raise ValueError(f"{where} has {name} {short(message[name])}, which is not supported; {remedy}")
    checked = {name: value for name, value in message.items() if value is not None}
    calls = checked.pop("tool_calls", [])
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where} has tool_calls {short(calls)}; it must be a list")
    if calls:
        checked["tool_calls"] = [_checked_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = checked.get("content")
    if content is None and role == "assistant":
        content = checked.get("refusal", None if calls else "")
    elif content is None and not calls and role != "tool":
        raise ValueError(f"{where} ({role}) has no content; pass a string")
    elif content is None:  # a tool that returns nothing
        content = ""
    if content is None or isinstance(content, str):
        return {**checked, "content": content}
    parts, thoughts = _checked_parts(content, f"{where} ({role})")
    if thoughts and not any(checked.get(name) for name in REASONING):
        checked["reasoning_content"] = "\n".join(thoughts)
    return {**checked, "content": parts or ""}


def _checked_parts(content: object, where: str) -> tuple[list[JsonObject], list[str]]:
    """The text parts of a content, and the texts of its parts with reasoning."""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{where} has content {short(content)}; it must be a string or a list of text parts")
    parts, thoughts = [], []
    for part in content:
        given = {"type": "text", "text": part} if isinstance(part, str) else part if isinstance(part, Mapping) else {}
        kind = given.get("type", "text")
        if kind == "thinking":
            inner = given.get("thinking")
            thoughts.append(inner if isinstance(inner, str) else text_of(_checked_parts(inner, where)[0]))
            continue
        text = given.get("refusal" if kind == "refusal" else "text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where} has the content part {short(part)}; only text is supported: {{'type': 'text', 'text': ...}}"
            )
        parts.append({"type": "text", "text": text})
    return parts, thoughts


def _checked_call(call: object, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {short(call)}; it must have a 'function' with a 'name' and 'arguments'")
    plain = {name: value for name, value in call.items() if value is not None}
    return {**plain, "function": {**function, "arguments": _read_arguments(function.get("arguments"))}}


def _read_arguments(given: object) -> object:
    arguments, text = given, None
    if isinstance(given, str) and given:
        try:
            arguments, text = json.loads(given), given
        except (ValueError, RecursionError):
            return given
    if arguments in (None, ""):
        return Arguments({})
    return Arguments(arguments, _unescaped(arguments, text)) if isinstance(arguments, Mapping) else arguments


def _unescaped(arguments: Mapping[str, object], text: str | None) -> str | None:
    """The JSON text with the characters themselves: many clients escape those beyond ASCII, which costs three times the
    tokens and is not what the model wrote."""
    if text is None or "\\u" not in text:
        return text
    plain = json.dumps(arguments, ensure_ascii=False)
    return text if any("\ud800" <= character <= "\udfff" for character in plain) else plain
