"""Conversations: validating messages from any client or server and adapting them to a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from fastgen_jax.json_types import JsonFields, JsonObject

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"  # around a call in the format of Hermes, Qwen, SmolLM and many others

_TESTS_FOR_NONE = re.compile(r"\bcontent\b[\"'\]\s]*(?:is\s+(?:not\s+)?|[!=]=\s*)[nN]one\b")
_NAMES_TOOL_ROLE = re.compile(r"[\"']tool[\"']")

Message = JsonObject  # checked, and adapted to a template


def short(value: object) -> str:
    """Returns a value as error messages show it: its type and at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with too many digits, or a list nested too deeply
        return f"a {type(value).__name__}"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def checked_messages(messages: Sequence[JsonFields]) -> list[Message]:
    """Returns the messages without empty fields; ValueError names a malformed message and what is wrong.

    Text parts are joined by newlines. Arguments of tool calls are parsed if they are JSON text, because templates expect
    objects but OpenAI's protocol sends strings; other text stays as the model wrote it. Null fields and an empty list of
    calls are removed, because templates test whether a field exists. An assistant's message without content and calls gets
    the content "".
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role': ..., 'content': ...}}, got {short(messages)}")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def versions(messages: Sequence[Message], template: str) -> Iterator[list[Message]]:
    """Yields versions of checked messages that `template` may accept, the most faithful one first.

    Tool calls and their results become text if the template does not support them. A developer's message becomes a system
    message if the template does not know the role, and in a further version part of the user's next message, for models
    without system messages. In the last versions, arguments of calls that are not objects are wrapped in one.
    """
    fitted = _with_contents(_with_calls_as_text(messages, template), template)
    forms: list[Callable[[list[Message]], list[Message]]] = [lambda same: same]
    if "developer" not in template and instructions(messages):
        forms = [_developer_as_system, _developer_in_user]
    for arguments in (lambda same: same, _wrapped_arguments):
        for form in forms:
            yield arguments(form(fitted))
        if _wrapped_arguments(fitted) == fitted:
            return


def instructions(messages: Sequence[Message]) -> list[str]:
    """Returns the texts of developer messages, which the prompt must contain."""
    return [message["content"].strip() for message in messages if message["role"] == "developer"]


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
    elif content is None and not calls:
        raise ValueError(f"{where} ({role}) has no content; pass a string")
    elif content is None:
        content = ""
    if content is not None and not isinstance(content, str):
        content = _joined_text(content, f"{where} ({role})")
    return {**checked, "content": content}


def _joined_text(content: object, where: str) -> str:
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


def _checked_call(call: object, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {short(call)}; it must have a 'function' with a 'name' and 'arguments'")
    plain = {name: value for name, value in call.items() if value is not None}
    return {**plain, "function": {**function, "arguments": _read_arguments(function.get("arguments"))}}


def _read_arguments(arguments: object) -> object:
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return {} if arguments in (None, "") else arguments


def _with_contents(messages: list[Message], template: str) -> list[Message]:
    """Replaces null content, which comes with tool calls, by "" for a template that would print it as None."""
    if _TESTS_FOR_NONE.search(template):
        return messages
    return [{**message, "content": "" if message["content"] is None else message["content"]} for message in messages]


def _with_calls_as_text(messages: Sequence[Message], template: str) -> list[Message]:
    converted = list(messages)
    if "tool_calls" not in template:
        converted = [_calls_as_text(message) if "tool_calls" in message else message for message in converted]
    if _NAMES_TOOL_ROLE.search(template):
        return converted
    result: list[Message] = []
    for message in converted:
        if message["role"] != "tool":
            result.append(message)
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if result and result[-1].get("role") == "user" and result[-1]["content"].endswith("</tool_response>"):
            result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n{text}"}
        else:
            result.append({"role": "user", "content": text})
    return result


def _calls_as_text(message: Message) -> Message:
    texts = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        texts.append(f'{CALL_OPEN}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {written}}}{CALL_CLOSE}')
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(texts)}


def _developer_as_system(messages: list[Message]) -> list[Message]:
    """Turns developer messages into system messages, merged with a preceding one, as many templates accept only one."""
    result: list[Message] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        if role == "system" and result and result[-1]["role"] == "system":
            result[-1] = {**result[-1], "content": f"{result[-1]['content']}\n\n{message['content']}"}
        else:
            result.append({**message, "role": role})
    return result


def _developer_in_user(messages: list[Message]) -> list[Message]:
    """Puts developer messages before the user's next message; after the last one, they become a user message."""
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
    """Wraps arguments that are not objects, for templates that iterate over the names of arguments."""

    def wrapped(call: Message) -> Message:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, Mapping):
            return call
        return {**call, "function": {**call["function"], "arguments": {"arguments": arguments}}}

    return [
        {**message, "tool_calls": [wrapped(call) for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in messages
    ]
