"""POST /v1/responses: the body, and the chat that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.errors import ApiError, from_validation_errors, unsupported
from fastgen_jax.serving.fields import Body, ChatOptions, check_neutral, short
from fastgen_jax.serving.protocol import ChatRequest
from fastgen_jax.serving.responses.items import messages_of
from fastgen_jax.serving.sampling_fields import StreamOptions

# Fields that a chat has under the same name.
_SAME = (
    *ChatOptions.PASSED_ON,
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "min_tokens", "ignore_eos", "user"),
    *("parallel_tool_calls", "chat_template_kwargs", "thinking_budget"),
)
# Names of a chat in errors -> those of this API.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}


class Reasoning(Body):
    """How much the model reasons. Its reasoning is returned as it is, so no summary is made."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class TextFormat(Body):
    """Free text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """The form of the text."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ConversationRequest(Body):
    """POST /v1/responses/input_tokens: the fields that become part of the prompt, and those that only shape the answer."""

    model: str | None = Field(None, description="None: the served model.")
    input: str | list[JsonObject] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[JsonObject], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    conversation: None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="Extension.")

    @model_validator(mode="after")
    def _has_its_schema(self) -> ConversationRequest:
        if self.text is not None and self.text.format is not None:
            form = self.text.format
            if (form.type == "json_schema") != (form.schema_ is not None):
                raise ValueError("text.format: schema and type 'json_schema' belong together; set both or neither")
        return self


class ResponsesRequest(ConversationRequest, ChatOptions):
    """The body. Fields described as extensions are not in OpenAI's API."""

    # Fields that this server cannot fulfil -> values that ask for nothing.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "prompt": (None,),
        "service_tier": (None, "auto", "default"),
        "context_management": (None, []),
        "moderation": (None,),
    }
    # What a client may ask to be included, if there is any of it; reasoning is included in any case.
    INCLUDABLE: ClassVar = frozenset(
        {
            "reasoning.encrypted_content",
            "message.output_text.logprobs",
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
        }
    )

    store: bool | None = None
    background: bool | None = Field(None, description="Generate the response whether or not the client waits for it.")
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: int | None = Field(None, description="Limits built-in tools, of which there are none.")
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    prompt: object = None
    service_tier: object = None
    context_management: object = None
    moderation: object = None
    repetition_penalty: float | None = Field(None, description="Extension.")
    presence_penalty: float | None = Field(None, description="Extension.")
    frequency_penalty: float | None = Field(None, description="Extension.")
    stop: str | list[str] | None = Field(None, description="Extension.")
    min_tokens: int | None = Field(None, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension.")
    thinking_budget: int | None = Field(None, description="Extension.")

    @model_validator(mode="after")
    def _supported(self) -> ResponsesRequest:
        check_neutral(self, self.NEUTRAL)
        if self.background and self.store is False:
            raise ValueError("background=true requires that the response is stored; remove store=false")
        for name in self.include or ():
            if name not in self.INCLUDABLE:
                raise ValueError(f"include has {short(name)}; choose among {', '.join(sorted(self.INCLUDABLE))}")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are returned."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


def chat_of(body: ConversationRequest, items: Sequence[JsonObject], *, model: str) -> ChatRequest:
    """The chat of a request whose conversation is `items`; ApiError with the names of this API if there can be none."""
    given = {name: getattr(body, name) for name in _SAME if name in type(body).model_fields}
    fields: JsonObject = {"model": model, **{name: value for name, value in given.items() if value is not None}}
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    tools, choice = _tools(body)
    fields |= {
        "messages": [*system, *messages_of(items)],
        "tools": tools or None,
        "tool_choice": choice,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "verbosity": body.text.verbosity if body.text else None,
        "response_format": _response_format(body.text.format if body.text else None),
    }
    if isinstance(body, ResponsesRequest):
        fields["max_completion_tokens"] = body.max_output_tokens
    if isinstance(body, ResponsesRequest) and body.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise renamed(from_validation_errors(error.errors())) from error


def renamed(error: ApiError) -> ApiError:
    """The error of a chat with the names of this API."""
    fields = error.body["error"]
    fields["param"] = _NAMES.get(fields["param"], fields["param"])
    return error


def _tools(body: ConversationRequest) -> tuple[list[JsonFields], str | JsonFields | None]:
    """Tools and choice in the form of chats."""
    tools = []
    for i, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            raise unsupported(f"tools[{i}].type", tool.get("type"), "only functions can be called; remove it")
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return tools, choice if tools or choice == "required" else None
    if choice.get("type") == "allowed_tools":
        allowed = {tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, dict)}
        return [tool for tool in tools if tool["function"].get("name") in allowed], str(choice.get("mode", "auto"))
    if choice.get("type") != "function":
        raise unsupported("tool_choice", choice, "only functions can be called")
    return tools, {"type": "function", "function": {"name": str(choice.get("name"))}}


def _response_format(form: TextFormat | None) -> JsonFields | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    named = {"name": form.name, "schema": form.schema_, "strict": form.strict, "description": form.description}
    return {"type": "json_schema", "json_schema": {name: value for name, value in named.items() if value is not None}}
