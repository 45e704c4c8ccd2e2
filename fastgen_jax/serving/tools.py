"""Tool calls: describing tools to the model, forcing a call, and reading calls from the model's text.

A forced call is JSON constrained by a grammar, whatever the model. Where the model may choose ("auto"), its text is searched
for `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, the form that Hermes, Qwen, SmolLM and many others are trained
on.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.errors import ApiError, unsupported
from fastgen_jax.serving.guided import Guide
from fastgen_jax.serving.protocol import ChatRequest, NamedTool, Sampling, Tool
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.adapt import CALL_CLOSE, CALL_OPEN
from fastgen_jax.text.grammar import JSON_LAYOUT, Grammar, GrammarError
from fastgen_jax.text.schemas import Fitted, fitted

_VALUE_KEYWORDS = frozenset({"const", "default", "enum", "examples"})  # their values are data, not schemas


class FunctionDelta(TypedDict):
    """The part of a function call in one event; the name comes with the first."""

    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """The part of a tool call in one event; id and type come with the first."""

    index: int
    id: NotRequired[str]
    type: NotRequired[str]
    function: FunctionDelta


class ToolCall(TypedDict):
    """A complete tool call."""

    id: str
    type: str
    function: FunctionDelta


def guide_of(body: Sampling) -> Guide | None:
    """Returns the grammar that a request demands of its answer, if any; a large schema takes up to a second."""
    if not isinstance(body, ChatRequest) or not body.forces_tool:
        try:
            return body.guide()
        except GrammarError as error:
            raise ApiError(str(error), param=next(iter(body.constraints))) from None
    usable = [_schema_of(i, tool) for i, tool in enumerate(body.tools or ())]
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    if named is not None:
        index = next(i for i, tool in enumerate(body.tools or ()) if tool.function.name == named)
        return Guide("tools", Grammar.json_schema(usable[index].schema), usable[index].relaxed)
    schemas = {tool.function.name: schema.schema for tool, schema in zip(body.tools or (), usable, strict=True)}
    relaxed = dict.fromkeys(word for schema in usable for word in schema.relaxed)
    return Guide("tools", Grammar.json_schema(_forced_schema(schemas)), tuple(relaxed))


def _schema_of(index: int, tool: Tool) -> Fitted:
    """The schema of a tool's arguments; ApiError for a strict one that cannot be enforced to the letter."""
    try:
        return fitted(tool.function.schema_of_arguments, strict=bool(tool.function.strict))
    except GrammarError as error:
        raise ApiError(f"tools[{index}].function.parameters: {error}", param="tools") from None


def prepare_messages(
    tokenizer: Tokenizer, messages: Sequence[JsonFields], tools: Sequence[Tool], *, writes_calls: bool
) -> tuple[Sequence[JsonFields], Sequence[JsonFields] | None]:
    """Returns the messages, and the tools for the chat template.

    If the template has no tools, the messages describe them instead. With `writes_calls` the model may write calls in its
    own form; ApiError if that form cannot be read here.
    """
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    template = tokenizer.template(with_tools=True)
    source = template.text if template is not None else ""
    if not described:
        return messages, None
    if "tools" in source:
        if writes_calls and CALL_OPEN not in source:
            raise unsupported(
                "tool_choice",
                "auto",
                "this model writes tool calls in a format that this server cannot read; "
                "use tool_choice='required' or name a function, which is enforced by a grammar",
            )
        return messages, described
    text = (
        "You may call functions. These are available, one JSON object per line:\n"
        + "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in described)
        + f'\nTo call one, write: {CALL_OPEN}{{"name": "function name", "arguments": {{...}}}}{CALL_CLOSE}'
    )
    start = int(messages[0].get("role") == "system")
    return [*messages[:start], {"role": "developer", "content": text}, *messages[start:]], None


class ToolReader:
    """Splits the text of an answer, piece by piece, into content and tool calls."""

    def __init__(self, body: ChatRequest) -> None:
        choice = body.tool_choice
        self._named = choice.function.name if isinstance(choice, NamedTool) else None
        self._forced = body.forces_tool
        self._one = body.parallel_tool_calls is False
        self._text = ""  # held back
        self._inside = False  # a tag is open
        self._after_call = False
        self._space = ""  # white space since the last call
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Returns the content that can be shown now, and deltas of tool calls."""
        if self._named is not None:  # the text is the arguments
            return "", [self._delta(0, self._named, text)] if text or not self.num_calls else []
        self._text += text
        if self._forced:
            return "", []
        content, calls = "", []
        while True:
            tag = CALL_CLOSE if self._inside else CALL_OPEN
            before, found, after = self._text.partition(tag)
            if not found:
                break
            self._text = after
            if self._inside:
                more, call = self._read(before, CALL_CLOSE)
                content, calls = content + more, calls + call
            else:
                content += self._outside(before)
            self._inside = not self._inside
        if not self._inside:
            keep = next(
                (k for k in range(min(len(CALL_OPEN) - 1, len(self._text)), 0, -1) if CALL_OPEN.startswith(self._text[-k:])),
                0,
            )  # it may be the start of a tag
            split = len(self._text) - keep
            content, self._text = content + self._outside(self._text[:split]), self._text[split:]
        return content, calls

    def flush(self) -> tuple[str, list[CallDelta]]:
        """Returns what was held back when the text ends; a length limit may have cut off a call."""
        text, self._text = self._text, ""
        if self._named is not None:
            return "", []
        if self._forced:
            calls = self._parsed(text)
            return (text, []) if calls is None else ("", calls)
        if self._inside:
            return self._read(text, "")
        return self._outside(text), []

    def _outside(self, text: str) -> str:
        """Text outside of calls, without white space that only separates calls."""
        text = self._space + text
        self._space = ""
        if self._after_call and not text.strip():
            text, self._space = "", text
        elif text:
            self._after_call = False
        return text

    def _read(self, text: str, end: str) -> tuple[str, list[CallDelta]]:
        """Returns a call if `text` is one, otherwise the text with its tags as content."""
        calls = self._parsed(text)
        if calls is None:
            return self._outside(f"{CALL_OPEN}{text}{end}"), []
        self._space, self._after_call = "", True
        return "", calls

    def _parsed(self, text: str) -> list[CallDelta] | None:
        """Returns the call in `text`, nothing if no further call is allowed, None if it is not a call."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None  # cut off by the length limit, or something else
        if not isinstance(name, str):
            return None
        if self._one and self.num_calls:
            return []
        return [
            self._delta(
                self.num_calls, name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            )
        ]

    def _delta(self, index: int, name: str, arguments: str) -> CallDelta:
        if index < self.num_calls:
            return {"index": index, "function": {"arguments": arguments}}
        self.num_calls += 1
        return {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def merge_calls(deltas: Sequence[CallDelta]) -> list[ToolCall]:
    """Returns the complete tool calls that `deltas` add up to."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({"id": delta["id"], "type": "function", "function": {**delta["function"]}})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


def _forced_schema(schemas: Mapping[str, JsonFields]) -> JsonFields:
    """The schema of a call of one of the functions with these names and schemas of arguments."""
    lenient = any("x-guidance" in schema for schema in schemas.values())
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": _relocated(schema, f"#/anyOf/{i}/properties/arguments")},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (name, schema) in enumerate(schemas.items())
    ]
    return {"anyOf": calls, **({"x-guidance": {**JSON_LAYOUT, "lenient": True}} if lenient else {})}


def _relocated(schema: object, place: str) -> object:
    """Returns a schema whose references to itself hold when it is embedded at `place` of another schema."""
    if isinstance(schema, list):
        return [_relocated(item, place) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # an $id starts a new base for the references below it
        return schema
    moved = {name: value if name in _VALUE_KEYWORDS else _relocated(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved
