"""POST /v1/messages: the body, and the chat that it asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.errors import ApiError, from_validation_errors, unsupported
from fastgen_jax.serving.fields import Body, ChatOptions, check_neutral, short
from fastgen_jax.serving.protocol import ChatRequest

_SAME = (*ChatOptions.PASSED_ON, "chat_template_kwargs")
# Names of a chat in errors -> those of this API.
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_budget": "thinking.budget_tokens",
}
Content = str | list[JsonObject]


class Thinking(Body):
    """Whether the model reasons, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """A schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Body):
    """How much the model reasons, and the form of its answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(Body):
    """What is removed from a conversation: only nothing. Thoughts of earlier turns are up to the chat template."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Body):
    """What is removed from a conversation that has grown long."""

    edits: list[ContextEdit] | None = None


class CountRequest(Body):
    """POST /v1/messages/count_tokens: the fields that become part of the prompt."""

    # Fields that this server cannot fulfil -> values that ask for nothing.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {"speed": (None, "standard")}

    model: str
    messages: Annotated[list[JsonObject], Field(min_length=1)]
    system: Content | None = None
    tools: Annotated[list[JsonObject], Field(max_length=128)] | None = None
    tool_choice: JsonObject | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: JsonObject | None = None
    speed: object = None
    chat_template_kwargs: JsonObject | None = Field(None, description="Extension.")

    @model_validator(mode="after")
    def _supported(self) -> CountRequest:
        check_neutral(self, self.NEUTRAL)
        return self


class MessagesRequest(CountRequest, ChatOptions):
    """The body. Fields described as extensions are not in Anthropic's API."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        **CountRequest.NEUTRAL,
        "container": (None,),
        "mcp_servers": (None, []),
        "service_tier": (None, "auto", "standard_only"),
        "inference_geo": (None,),
        "diagnostics": (None,),
    }

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    metadata: JsonObject | None = None
    container: object = None
    context_management: ContextManagement | None = None
    mcp_servers: object = None
    service_tier: object = None
    inference_geo: object = None
    diagnostics: object = None


def chat_of(body: CountRequest, *, switches: frozenset[str] = frozenset()) -> ChatRequest:
    """The chat of a request; ApiError with the names of this API if there can be none.

    `switches` are variables of the template: of "enable_thinking" and "thinking", those that it reads get the value that
    `thinking` asks for.
    """
    fields: JsonObject = {name: value for name in _SAME if (value := getattr(body, name, None)) is not None}
    system = [{"role": "system", "content": _text_parts(body.system, "system")}] if body.system else []
    choice = body.tool_choice or {}
    fields |= {
        "messages": [*system, *_messages(body.messages)],
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _tool_choice(choice) if body.tools else None,
    }
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    if (config := body.output_config) is not None and config.effort is not None:
        fields["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
    form = body.output_format or (config.format if config is not None else None)
    if form is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.schema_, "strict": True}}
    if body.thinking is not None:
        wanted = body.thinking.type != "disabled"
        variables = {name: wanted for name in ("enable_thinking", "thinking") if name in switches}
        fields["chat_template_kwargs"] = {**variables, **(body.chat_template_kwargs or {})}
        if body.thinking.budget_tokens is not None and wanted:
            fields["thinking_budget"] = body.thinking.budget_tokens
    if isinstance(body, MessagesRequest):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or None}
        if isinstance(user := (body.metadata or {}).get("user_id"), str):
            fields["user"] = user
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise renamed(from_validation_errors(error.errors())) from error


def renamed(error: ApiError) -> ApiError:
    """The error of a chat with the names of this API."""
    fields = error.body["error"]
    fields["param"] = _NAMES.get(fields["param"], fields["param"])
    return error


def _tool(tool: JsonFields, where: str) -> JsonFields:
    if tool.get("type") not in (None, "custom"):
        raise unsupported(f"{where}.type", tool.get("type"), "only tools with an input_schema can be called; remove it")
    function = {"name": tool.get("name"), "description": tool.get("description"), "strict": tool.get("strict")}
    parameters = {"parameters": tool["input_schema"]} if "input_schema" in tool else {}
    return {"type": "function", "function": {**function, **parameters}}


def _tool_choice(choice: JsonFields) -> str | JsonFields | None:
    match choice.get("type"):
        case None | "auto":
            return "auto"
        case "any":
            return "required"
        case "none":
            return "none"
        case "tool":
            return {"type": "function", "function": {"name": choice.get("name")}}
        case kind:
            raise ApiError(f"tool_choice.type is {short(kind)}; choose auto, any, tool or none", param="tool_choice")


def _messages(given: Sequence[JsonObject]) -> list[JsonObject]:
    messages: list[JsonObject] = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise ApiError(f"{where}.role is {short(role)}; it must be user, assistant or system", param="messages")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif isinstance(content, list):
            messages += _of_blocks(role, content, where)
        else:
            raise ApiError(f"{where}.content is {short(content)}; it must be a string or a list", param="messages")
    return messages


def _of_blocks(role: str, blocks: Sequence[object], where: str) -> list[JsonObject]:
    """The messages for the blocks of one: results of tools come first, in messages of their own."""
    results: list[JsonObject] = []
    texts: list[JsonObject] = []
    calls: list[JsonObject] = []
    thoughts: list[str] = []
    for i, given in enumerate(blocks):
        block = given if isinstance(given, dict) else {}
        match block.get("type"):
            case "text":
                texts.append({"type": "text", "text": block.get("text")})
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":  # nobody here can read it
                pass
            case "image":
                texts.append({"type": "image", "source": block.get("source")})
            case "tool_use":
                arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
                function = {"name": block.get("name"), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                content = _text_parts(block.get("content") or "", f"{where}.content[{i}]")
                results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
            case kind:
                raise ApiError(
                    f"{where}.content[{i}] has type {short(kind)}, which is not supported; use text, image, thinking, "
                    "tool_use and tool_result",
                    param="messages",
                )
    if not texts and not calls and results:
        return results
    message: JsonObject = {"role": role, "content": texts or None}
    if not texts and not calls:
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [*results, message]


def _text_parts(content: object, where: str) -> object:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ApiError(f"{where} has {short(part)}; only text is supported", param=where.partition("[")[0])
    return [{"type": "text", "text": part.get("text")} for part in parts]
