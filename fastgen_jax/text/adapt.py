"""Conversations in the forms that a chat template can read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from fastgen_jax.text.messages import REASONING, Arguments, Content, Message, text_of
from fastgen_jax.text.template_traits import Traits

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"  # around a call in the format of Hermes, Qwen, SmolLM and many others

# Of which roles a template may loop over the contents: of all, of the turns but not of a system message, of none.
_ROLES_IN_PARTS: tuple[Callable[[str], bool], ...] = (
    lambda role: True,
    lambda role: role in ("user", "assistant"),
    lambda role: False,
)
_TESTS_FOR_NONE = re.compile(r"\bcontent\b[\"'\]\s]*(?:is\s+(?:not\s+)?|[!=]=\s*)[nN]one\b")
_NAMES_TOOL_ROLE = re.compile(r"[\"']tool[\"']")


def versions(messages: Sequence[Message], template: str, traits: Traits) -> Iterator[list[Message]]:
    """Yields versions of checked messages that `template` may accept, the most faithful one first.

    Text parts stay parts for a template that loops over them, and are joined by newlines for others. An assistant's
    reasoning gets the name under which the template reads it. Tool calls and their results become text if the template does
    not support them. A developer's message becomes a system message if the template does not know the role, and in a further
    version part of the user's next message, for models without system messages. In the last versions, arguments of calls
    that are not objects are wrapped in one.
    """
    tried: list[list[Message]] = []
    for version in _versions(messages, template, traits):
        if version not in tried:
            tried.append(version)
            yield version


def _versions(messages: Sequence[Message], template: str, traits: Traits) -> Iterator[list[Message]]:
    for in_parts in _ROLES_IN_PARTS if traits.iterates_content else _ROLES_IN_PARTS[-1:]:
        given = [message if in_parts(message["role"]) else _joined(message) for message in messages]
        calls = given if "tool_calls" in template else [_calls_as_text(message) for message in given]
        forms = [calls] if _knows_results(template) else [_results_as_text(calls)]
        forms = [calls, *forms] if _may_know_results(template) else forms
        # Null content comes with tool calls. A template that does not test for it would print it as None.
        forms = [*(forms if _TESTS_FOR_NONE.search(template) else ()), *map(_without_null_contents, forms)]
        for form in forms:
            for version in _of_roles(form, template):
                yield [_fitted(message, traits, parts=in_parts(message["role"])) for message in version]


def required_texts(messages: Sequence[Message], template: str) -> list[str]:
    """Returns the texts that the prompt must contain: developer messages, and results if they may be left out."""
    roles = {"developer", "tool"} if _may_know_results(template) else {"developer"}
    return [text.strip() for message in messages if message["role"] in roles for text in _texts(message["content"])]


def _knows_results(template: str) -> bool:
    return _NAMES_TOOL_ROLE.search(template) is not None


def _may_know_results(template: str) -> bool:
    """Whether a template describes tools, but does not name the role of their results: it may print any role."""
    return "tools" in template and not _knows_results(template)


def shows_parts(text: str) -> bool:
    """Whether a template printed a list of parts, because it loops over those of other messages only."""
    return "{'type': 'text', 'text': " in text


def _of_roles(messages: list[Message], template: str) -> Iterator[list[Message]]:
    forms: list[Callable[[list[Message]], list[Message]]] = [lambda same: same]
    if "developer" not in template and any(message["role"] == "developer" for message in messages):
        forms = [_developer_as_system, _developer_in_user]
    for arguments in (lambda same: same, _wrapped_arguments):
        for form in forms:
            yield arguments(form(messages))
        if _wrapped_arguments(messages) == messages:
            return


def _fitted(message: Message, traits: Traits, *, parts: bool) -> Message:
    """The message with its reasoning where the template reads it; with `parts`, its content is a list if need be."""
    fitted = dict(message)
    thought = next((fitted[name] for name in REASONING if isinstance(fitted.get(name), str)), "")
    read = [name for name in REASONING if name in traits.fields]
    as_part = bool(thought) and parts and "thinking" in traits.part_types
    if thought and read and not as_part and not any(name in fitted for name in read):
        fitted[read[0]] = thought
    content = fitted["content"]
    if isinstance(content, str) and (as_part or (parts and not traits.tests_for_text)):
        fitted["content"] = [{"type": "text", "text": content}] if content or not as_part else []
    if as_part:
        fitted["content"] = [{"type": "thinking", "thinking": thought}, *(fitted["content"] or ())]
    return fitted


def _joined(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": text_of(content)} if isinstance(content, list) else message


def _texts(content: Content) -> list[str]:
    return [part["text"] for part in content] if isinstance(content, list) else [content or ""]


def _merged(separator: str, *contents: Content) -> Content:
    """Contents one after another: text if all are text, else parts."""
    if not any(isinstance(content, list) for content in contents):
        return separator.join(map(text_of, contents))
    parts: list[Message] = []
    for content in contents:
        parts += [{"type": "text", "text": separator}] if parts else []
        parts += content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    return parts


def _without_null_contents(messages: list[Message]) -> list[Message]:
    return [{**message, "content": "" if message["content"] is None else message["content"]} for message in messages]


def _results_as_text(messages: Sequence[Message]) -> list[Message]:
    result: list[Message] = []
    for message in messages:
        if message["role"] != "tool":
            result.append(message)
            continue
        text = f"<tool_response>\n{text_of(message['content'])}\n</tool_response>"
        before = text_of(result[-1]["content"]) if result and result[-1]["role"] == "user" else ""
        if before.endswith("</tool_response>"):
            result[-1] = {**result[-1], "content": f"{before}\n{text}"}
        else:
            result.append({"role": "user", "content": text})
    return result


def _calls_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    texts = [text_of(message["content"])] if message["content"] else []
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
            result[-1] = {**result[-1], "content": _merged("\n\n", result[-1]["content"], message["content"])}
        else:
            result.append({**message, "role": role})
    return result


def _developer_in_user(messages: list[Message]) -> list[Message]:
    """Puts developer messages before the user's next message; after the last one, they become a user message."""
    result: list[Message] = []
    waiting: list[Content] = []
    for message in messages:
        if message["role"] == "developer":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            result.append({**message, "content": _merged("\n\n", *waiting, message["content"])})
            waiting = []
        else:
            result.append(message)
    return [*result, {"role": "user", "content": _merged("\n\n", *waiting)}] if waiting else result


def _wrapped_arguments(messages: list[Message]) -> list[Message]:
    """Wraps arguments that are not objects, for templates that iterate over the names of arguments."""

    def wrapped(call: Message) -> Message:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, Mapping):
            return call
        return {**call, "function": {**call["function"], "arguments": Arguments({"arguments": arguments})}}

    return [
        {**message, "tool_calls": [wrapped(call) for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in messages
    ]
