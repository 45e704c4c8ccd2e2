"""Tool calls: what the model is told about tools, what it is forced to write, and how its text is read.

A forced call is JSON by grammar, whatever the model. Where the model may choose ("auto"), its text is read for the tags
`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, which Hermes, Qwen, SmolLM and many others are trained on.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastgen_jax.serving.errors import unsupported
from fastgen_jax.serving.protocol import ChatRequest, NamedTool, Sampling, Tool
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def grammar_of(body: Sampling) -> Grammar | None:
    """What the answer must look like, if the request says."""
    if isinstance(body, ChatRequest) and body.forces_tool:
        return Grammar.json_schema(_forced_schema(body))
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is not None:
        return Grammar.json_schema(form.json_schema.schema_)
    return Grammar.json_schema({"type": "object"})


def prepare_messages(
    tokenizer: Tokenizer, body: ChatRequest
) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """The messages, and the tools for the chat template; of a template without tools, the messages speak of them."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or () if body.tool_choice != "none"]
    source = tokenizer.templates.get("tool_use") or tokenizer.templates.get("default", "")
    if "tools" in source:
        if tools and not body.forces_tool and OPEN not in source:
            raise unsupported("tool_choice", "auto", "this model writes tool calls in a form that is not read here; "
                              "use tool_choice='required' or name a function, which is enforced by a grammar")
        return body.messages, tools or None
    messages = [_spelled_out(message) for message in body.messages]
    if not tools:
        return messages, None
    told = (
        "You may call functions. They are, one JSON object a line:\n"
        + "\n".join(json.dumps(tool["function"]) for tool in tools)
        + f'\nTo call one, write: {OPEN}{{"name": "function name", "arguments": {{...}}}}{CLOSE}'
    )
    if messages[0].get("role") == "system":
        first = {**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{told}"}
        return [first, *messages[1:]], None
    return [{"role": "system", "content": told}, *messages], None


class ToolReader:
    """Turns the text of an answer, piece by piece, into content and tool calls."""

    def __init__(self, body: ChatRequest) -> None:
        choice = body.tool_choice
        self._named = choice.function.name if isinstance(choice, NamedTool) else None
        self._forced = body.forces_tool
        self._one = body.parallel_tool_calls is False
        self._text = ""  # not yet given out
        self._inside = False  # a tag is open
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Content that can be shown now, and deltas of tool calls."""
        if self._named is not None:  # the text is the arguments, as they come
            return "", [self._delta(0, self._named, text)] if text or not self.num_calls else []
        self._text += text
        if self._forced:
            return "", []
        content, calls = "", []
        while True:
            tag = CLOSE if self._inside else OPEN
            before, found, after = self._text.partition(tag)
            if not found:
                break
            self._text = after
            if self._inside:
                calls += self._parsed(before)
            elif not self.num_calls:
                content += before
            self._inside = not self._inside
        if not self._inside and not self.num_calls:
            keep = next((k for k in range(min(len(OPEN) - 1, len(self._text)), 0, -1)
                         if OPEN.startswith(self._text[-k:])), 0)  # it may be the beginning of a tag
            split = len(self._text) - keep
            content, self._text = content + self._text[:split], self._text[split:]
        return content, calls

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left when the text ends."""
        text, self._text = self._text, ""
        if self._named is not None:
            return "", []
        if self._forced or self._inside:
            calls = self._parsed(text)
            return ("", calls) if calls or self.num_calls else (text, [])
        return ("" if self.num_calls else text), []

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError):
            return []  # cut off by the length limit, or not what was asked for
        if self._one and self.num_calls:
            return []
        return [self._delta(self.num_calls, str(name), json.dumps(arguments))]

    def _delta(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        if index < self.num_calls:
            return {"index": index, "function": {"arguments": arguments}}
        self.num_calls += 1
        return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": {"name": name, "arguments": arguments}}


def whole_calls(deltas: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tool calls that `deltas` add up to."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({"id": delta["id"], "type": "function", "function": dict(delta["function"])})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


def _forced_schema(body: ChatRequest) -> dict[str, Any]:
    tools: Sequence[Tool] = body.tools or ()
    if isinstance(body.tool_choice, NamedTool):
        named = body.tool_choice.function.name
        return next(tool.function.parameters for tool in tools if tool.function.name == named)
    return {"anyOf": [
        {"type": "object", "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
         "required": ["name", "arguments"], "additionalProperties": False}
        for tool in tools
    ]}


def _spelled_out(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose tool calls are text, for a template that knows no tools."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = []
    for call in calls:
        function = call.get("function", {}) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
        texts.append(f'{OPEN}{{"name": {json.dumps(function.get("name"))}, "arguments": {text or "{}"}}}{CLOSE}')
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([*([message["content"]] if message.get("content") else []), *texts])}
