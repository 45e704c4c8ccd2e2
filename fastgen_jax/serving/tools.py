"""Tool calls: describing tools to the model, and calls in OpenAI's format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import NotRequired, TypedDict

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.conversation import NamedTool, Tool
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.guided import Guide
from fastgen_jax.serving.protocol import ChatRequest
from fastgen_jax.serving.sampling_fields import Sampling
from fastgen_jax.serving.tool_formats import ToolFormat
from fastgen_jax.serving.tool_formats.pieces import Piece
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.adapt import CALL_CLOSE, CALL_OPEN
from fastgen_jax.text.grammar import GrammarError, check_size
from fastgen_jax.text.schemas import Fitted, closed, fitted

CALL_ID_LENGTH = 24  # characters after "call_"


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
    """Returns the grammar of the text that a request demands, if any; a large schema takes up to a second."""
    try:
        return body.guide()
    except GrammarError as error:
        raise ApiError(str(error), param=next(iter(body.constraints))) from None


def guide_of_calls(body: ChatRequest, form: ToolFormat, tokenizer: Tokenizer) -> Guide:
    """Returns the grammar of the calls that a request demands, in the form of the model; it may take up to a second."""
    tools = list(enumerate(body.tools or ()))
    check_size("tools", "".join(json.dumps(tool.function.schema_of_arguments) for _, tool in tools))
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    usable = {tool.function.name: _schema_of(i, tool) for i, tool in tools if named in (None, tool.function.name)}
    schemas = {name: schema.schema for name, schema in usable.items()}
    relaxed = dict.fromkeys(word for schema in usable.values() for word in schema.relaxed)
    several = named is None and body.parallel_tool_calls is not False
    return Guide("tools", form.grammar(schemas, tokenizer, several=several), tuple(relaxed))


def _schema_of(index: int, tool: Tool) -> Fitted:
    """The schema of a tool's arguments; ApiError for a strict one that cannot be enforced to the letter.

    It has no arguments but those that are described: a function would fail with any other.
    """
    try:
        usable = fitted(tool.function.schema_of_arguments, strict=bool(tool.function.strict))
        return replace(usable, schema=closed(usable.schema))
    except GrammarError as error:
        raise ApiError(f"tools[{index}].function.parameters: {error}", param="tools") from None


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

    def __init__(self, id_length: int) -> None:
        self._index = -1
        self._id_length = id_length

    def deltas(self, pieces: Sequence[Piece]) -> list[CallDelta]:
        """The deltas for the pieces of one event, at most one for each call."""
        deltas: list[CallDelta] = []
        for piece in pieces:
            if piece.kind == "call":
                self._index += 1
                deltas.append(
                    {
                        "index": self._index,
                        "id": self._new_id(),
                        "type": "function",
                        "function": {"name": piece.text, "arguments": ""},
                    }
                )
            elif piece.kind == "arguments":
                if not deltas or deltas[-1]["index"] != self._index:
                    deltas.append({"index": self._index, "function": {"arguments": ""}})
                deltas[-1]["function"]["arguments"] += piece.text
        return deltas

    def _new_id(self) -> str:
        text = uuid.uuid4().hex[: self._id_length]
        return text if self._id_length < CALL_ID_LENGTH else f"call_{text}"


def merge_calls(deltas: Sequence[CallDelta]) -> list[ToolCall]:
    """Returns the complete tool calls that `deltas` add up to."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({"id": delta["id"], "type": "function", "function": {**delta["function"]}})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls
