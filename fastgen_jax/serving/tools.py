"""Tool calls: describing tools to the model, and calls in OpenAI's format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.protocol import Tool
from fastgen_jax.serving.tool_formats.pieces import Piece
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.adapt import CALL_CLOSE, CALL_OPEN


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


def prepare_messages(
    tokenizer: Tokenizer, messages: Sequence[JsonFields], tools: Sequence[Tool]
) -> tuple[Sequence[JsonFields], Sequence[JsonFields] | None]:
    """Returns the messages, and the tools for the chat template.

    If the template has no tools, the messages describe them instead.
    """
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    template = tokenizer.template(with_tools=True)
    if not described:
        return messages, None
    if template is not None and "tools" in template.text:
        return messages, described
    text = (
        "You may call functions. These are available, one JSON object per line:\n"
        + "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in described)
        + f'\nTo call one, write: {CALL_OPEN}{{"name": "function name", "arguments": {{...}}}}{CALL_CLOSE}'
    )
    start = int(messages[0].get("role") == "system")
    return [*messages[:start], {"role": "developer", "content": text}, *messages[start:]], None


class CallWriter:
    """Turns pieces of one answer into deltas of its tool calls."""

    def __init__(self) -> None:
        self._index = -1

    def deltas(self, pieces: Sequence[Piece]) -> list[CallDelta]:
        """The deltas for the pieces of one event, at most one for each call."""
        deltas: list[CallDelta] = []
        for piece in pieces:
            if piece.kind == "call":
                self._index += 1
                deltas.append(
                    {
                        "index": self._index,
                        "id": f"call_{uuid.uuid4().hex[:24]}",
                        "type": "function",
                        "function": {"name": piece.text, "arguments": ""},
                    }
                )
            elif piece.kind == "arguments":
                if not deltas or deltas[-1]["index"] != self._index:
                    deltas.append({"index": self._index, "function": {"arguments": ""}})
                deltas[-1]["function"]["arguments"] += piece.text
        return deltas


def merge_calls(deltas: Sequence[CallDelta]) -> list[ToolCall]:
    """Returns the complete tool calls that `deltas` add up to."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({"id": delta["id"], "type": "function", "function": {**delta["function"]}})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls
