"""The messages of a conversation, from whatever client or server wrote them, in a form that a chat template takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"  # how Hermes, Qwen, SmolLM and many others write a call

_TESTS_FOR_NONE = re.compile(r"\bcontent\b[\"'\]\s]*(?:is\s+(?:not\s+)?|[!=]=\s*)[nN]one\b")
_NAMES_TOOL_ROLE = re.compile(r"[\"']tool[\"']")

Message = dict[str, Any]


def short(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of many digits, or a very deep list
        return f"a {type(value).__name__}"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages without what says nothing; ValueError names the malformed one and what is wrong.

    Text parts are joined by newlines, and the arguments of tool calls are parsed where they are JSON text: templates
    expect objects, OpenAI's protocol sends strings. What is not JSON stays the text that the model wrote. Fields that are
    null and an empty list of calls are left out, because templates ask whether a field is there; an assistant that said
    nothing and called nothing has the content "".
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role': ..., 'content': ...}}, got {short(messages)}")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def versions(messages: Sequence[Message], template: str) -> Iterator[list[Message]]:
    """Checked messages as `template` may take them, the most faithful form first.

    Tool calls and their results become text for a template that knows none. A developer's message becomes the system's
    where the role is unknown, and in a further version part of the next message of the user, for models without a system
    message. Arguments of calls that are no object are wrapped in one in the last versions.
    """
    fitted = _with_contents(_with_spelled_calls(messages, template), template)
    forms: list[Callable[[list[Message]], list[Message]]] = [lambda same: same]
    if "developer" not in template and instructions(messages):
        forms = [_developer_as_system, _developer_in_user]
    for arguments in (lambda same: same, _wrapped_arguments):
        for form in forms:
            yield arguments(form(fitted))
        if _wrapped_arguments(fitted) == fitted:
            return


def instructions(messages: Sequence[Message]) -> list[str]:
    """What a developer says; a prompt that does not show it has lost it."""
    return [message["content"].strip() for message in messages if message["role"] == "developer"]


def _checked_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {short(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} has role {role!r}; it must be a string such as 'system', 'user' or 'assistant'")
    for name, remedy in (("audio", "give its text as content"), ("function_call", "send tool_calls, its newer form")):
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
    elif content is None and not calls:
        raise ValueError(f"{where} ({role}) has no content; give a string")
    elif content is None:
        content = ""
    if content is not None and not isinstance(content, str):
        content = _joined_text(content, f"{where} ({role})")
    return {**checked, "content": content}


def _joined_text(content: Any, where: str) -> str:
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{where} has content {short(content)}; it must be a string or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where} has the content part {short(part)}; only text is supported: {{'type': 'text', 'text': ...}}"
            )
        texts.append(text)
    return "\n".join(texts)


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {short(call)}; it must have a 'function' with a 'name' and 'arguments'")
    plain = {name: value for name, value in call.items() if value is not None}
    return {**plain, "function": {**function, "arguments": _read_arguments(function.get("arguments"))}}


def _read_arguments(arguments: Any) -> Any:
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return {} if arguments in (None, "") else arguments


def _with_contents(messages: list[Message], template: str) -> list[Message]:
    """Null content, which comes with tool calls, is "" for a template that would print it as None."""
    if _TESTS_FOR_NONE.search(template):
        return messages
    return [{**message, "content": "" if message["content"] is None else message["content"]} for message in messages]


def _with_spelled_calls(messages: Sequence[Message], template: str) -> list[Message]:
    spelled = list(messages)
    if "tool_calls" not in template:
        spelled = [_spelled_calls(message) if "tool_calls" in message else message for message in spelled]
    if _NAMES_TOOL_ROLE.search(template):
        return spelled
    result: list[Message] = []
    for message in spelled:
        if message["role"] != "tool":
            result.append(message)
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if result and result[-1].get("role") == "user" and result[-1]["content"].endswith("</tool_response>"):
            result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n{text}"}
        else:
            result.append({"role": "user", "content": text})
    return result


def _spelled_calls(message: Message) -> Message:
    texts = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        texts.append(f'{CALL_OPEN}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {written}}}{CALL_CLOSE}')
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(texts)}


def _developer_as_system(messages: list[Message]) -> list[Message]:
    """Beside a system message the developer's joins it: many templates take one at the start, and no second."""
    result: list[Message] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        if role == "system" and result and result[-1]["role"] == "system":
            result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n\n{message['content']}"}
        else:
            result.append({**message, "role": role})
    return result


def _developer_in_user(messages: list[Message]) -> list[Message]:
    """Before the next message of the user; if there is none, a message of the user itself."""
    result: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "developer":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            result.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            result.append(message)
    return [*result, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else result


def _wrapped_arguments(messages: list[Message]) -> list[Message]:
    """Every call with an object, for templates that go through the names of its arguments."""

    def wrapped(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, Mapping):
            return call
        return {**call, "function": {**call["function"], "arguments": {"arguments": arguments}}}

    return [
        {**message, "tool_calls": [wrapped(call) for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in messages
    ]
