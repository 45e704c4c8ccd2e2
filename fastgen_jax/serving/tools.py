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
from fastgen_jax.text.messages import CALL_CLOSE, CALL_OPEN

_VALUES = frozenset({"const", "default", "enum", "examples"})  # parts of a JSON schema that are no schemas


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
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, writes_calls: bool
) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """The messages, and the tools for the chat template; of a template without tools, the messages speak of them.

    `writes_calls`: the model may write calls in its own form, which is refused if it is none that is read here.
    """
    told = [tool.model_dump(exclude_none=True) for tool in tools]
    source = tokenizer.templates.get("tool_use") or tokenizer.templates.get("default", "")
    if not told:
        return messages, None
    if "tools" in source:
        if writes_calls and CALL_OPEN not in source:
            raise unsupported(
                "tool_choice",
                "auto",
                "this model writes tool calls in a form that is not read here; "
                "use tool_choice='required' or name a function, which is enforced by a grammar",
            )
        return messages, told
    text = (
        "You may call functions. They are, one JSON object a line:\n"
        + "\n".join(json.dumps(tool["function"]) for tool in told)
        + f'\nTo call one, write: {CALL_OPEN}{{"name": "function name", "arguments": {{...}}}}{CALL_CLOSE}'
    )
    start = int(messages[0].get("role") == "system")
    return [*messages[:start], {"role": "developer", "content": text}, *messages[start:]], None


class ToolReader:
    """Turns the text of an answer, piece by piece, into content and tool calls."""

    def __init__(self, body: ChatRequest) -> None:
        choice = body.tool_choice
        self._named = choice.function.name if isinstance(choice, NamedTool) else None
        self._forced = body.forces_tool
        self._one = body.parallel_tool_calls is False
        self._text = ""  # not yet given out
        self._inside = False  # a tag is open
        self._behind_call = False
        self._space = ""  # what was there of it
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
            tag = CALL_CLOSE if self._inside else CALL_OPEN
            before, found, after = self._text.partition(tag)
            if not found:
                break
            self._text = after
            if self._inside:
                more, call = self._read(before, CALL_CLOSE)
                content, calls = content + more, calls + call
            else:
                content += self._between(before)
            self._inside = not self._inside
        if not self._inside:
            keep = next(
                (k for k in range(min(len(CALL_OPEN) - 1, len(self._text)), 0, -1) if CALL_OPEN.startswith(self._text[-k:])),
                0,
            )  # it may be the beginning of a tag
            split = len(self._text) - keep
            content, self._text = content + self._between(self._text[:split]), self._text[split:]
        return content, calls

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left when the text ends; a call without its end may have been cut off by a limit."""
        text, self._text = self._text, ""
        if self._named is not None:
            return "", []
        if self._forced:
            calls = self._parsed(text)
            return (text, []) if calls is None else ("", calls)
        if self._inside:
            return self._read(text, "")
        return self._between(text), []

    def _between(self, text: str) -> str:
        """Text outside of calls. White space behind a call only parts it from the next one, until other text follows."""
        text = self._space + text
        self._space = ""
        if self._behind_call and not text.strip():
            text, self._space = "", text
        elif text:
            self._behind_call = False
        return text

    def _read(self, text: str, end: str) -> tuple[str, list[dict[str, Any]]]:
        """A call if `text` is one; else what the model wrote, as content."""
        calls = self._parsed(text)
        if calls is None:
            return self._between(f"{CALL_OPEN}{text}{end}"), []
        self._space, self._behind_call = "", True
        return "", calls

    def _parsed(self, text: str) -> list[dict[str, Any]] | None:
        """The call that `text` is, unless there may be no more; None if it is none."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None  # cut off by the length limit, or not what was asked for
        if not isinstance(name, str):
            return None
        if self._one and self.num_calls:
            return []
        return [self._delta(self.num_calls, name, arguments if isinstance(arguments, str) else json.dumps(arguments))]

    def _delta(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        if index < self.num_calls:
            return {"index": index, "function": {"arguments": arguments}}
        self.num_calls += 1
        return {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def merge_calls(deltas: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": _moved(tool.function.parameters, f"#/anyOf/{i}/properties/arguments"),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, tool in enumerate(tools)
        ]
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold at `place` of another one too."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # references below an $id go from there
        return schema
    moved = {name: value if name in _VALUES else _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved
