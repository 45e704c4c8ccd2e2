"""Request bodies, validated by pydantic. Unknown fields are refused, and so are known but unsupported ones."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastgen_jax.json_types import JsonObject
from fastgen_jax.scheduling.request import MAX_TOP_LOGPROBS
from fastgen_jax.serving.conversation import ChatPrompt, NamedTool, Tool
from fastgen_jax.serving.fields import Body, TokenId
from fastgen_jax.serving.sampling_fields import NO_TOP, Sampling


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    NEUTRAL: ClassVar = {**Sampling.NEUTRAL, "suffix": (None, ""), "prompt_embeds": (None,)}

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(max_length=10_000_000)
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = False
    add_special_tokens: bool | None = Field(
        None, description="Extension: false adds no beginning-of-sequence token to a prompt of text."
    )
    suffix: object = None
    prompt_embeds: object = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.logprobs_mode == "processed" and self.logprobs:
            raise ValueError(NO_TOP.format(name="logprobs", value=self.logprobs, remedy="use logprobs=0"))
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 requests no output; raise it, or set echo=true to get the prompt back")
        if not self.prompts:
            raise ValueError("prompt is empty; pass at least one")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]

    @property
    def num_top_of_prompt(self) -> int | None:
        """Alternatives that are needed for each token of the prompt; None: not even its log-probability."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)


class ChatRequest(ChatPrompt, Sampling):
    """POST /v1/chat/completions."""

    NEUTRAL: ClassVar = {
        **{name: values for name, values in Sampling.NEUTRAL.items() if name != "store"},
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "web_search_options": (None,),
        "moderation": (None,),
    }

    messages: Annotated[list[JsonObject], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    store: bool | None = Field(None, description="Keep the answer, for the other requests to /v1/chat/completions.")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = Field(
        None, description="Extension: with continue_final_message, the answer starts with that message."
    )
    modalities: object = None
    audio: object = None
    prediction: object = None
    functions: object = None
    function_call: object = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Extension: maximum number of tokens of reasoning, which is then ended."
    )
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = Field(None, description="vLLM's name of thinking_budget.")
    include_reasoning: bool | None = Field(None, description="Extension: false leaves the reasoning out of the answer.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="A variable of the chat template; ignored if it reads none of that name."
    )
    web_search_options: object = None
    moderation: object = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(
                f"max_tokens={both[0]} and max_completion_tokens={both[1]} mean the same; pass only one of them"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs=true")
        if self.logprobs_mode == "processed" and self.top_logprobs:
            raise ValueError(NO_TOP.format(name="top_logprobs", value=self.top_logprobs, remedy="omit it"))
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice requires tools")
        if self.echo and not self.continue_final_message:
            raise ValueError("echo requires continue_final_message=true in a chat; set it, or remove echo")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not in tools: {names}")
        # A response_format is that of the text, of which there is none beside a forced call.
        if self.forces_tool and (others := self.constraints.keys() - {"response_format"}):
            raise ValueError(
                f"{min(others)} cannot be combined with a forced tool call, which has a grammar already; remove it"
            )
        return self

    @property
    def described_tools(self) -> list[Tool]:
        """The tools that are described to the model."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def budget(self) -> int | None:
        """Maximum number of tokens of reasoning."""
        return self.thinking_token_budget if self.thinking_budget is None else self.thinking_budget

    @property
    def forces_tool(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class TokenizeRequest(ChatPrompt):
    """POST /tokenize: a text, or a conversation with the fields of a chat that become part of its prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[JsonObject], Field(min_length=1)] | None = None
    return_token_strs: bool | None = Field(None, description="Extension: return the text of each token.")
    mm_processor_kwargs: Literal[None] = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("pass either prompt or messages")
        for name in ("tools", "chat_template_kwargs", "chat_template", "continue_final_message", "documents"):
            if self.messages is None and getattr(self, name):
                raise ValueError(f"{name} require messages; remove them")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class GenerateRequest(BaseModel):
    """POST /mii/{deployment}: prompts, and generation options named as in `SamplingParams`."""

    model_config = ConfigDict(extra="allow")

    prompts: str | list[str] | list[TokenId] | list[list[TokenId]] | list[list[JsonObject]] | list[JsonObject]
    stream: bool = False
    return_full_text: bool = False
    echo: bool = False
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    timeout: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> GenerateRequest:
        if self.stream and (self.return_full_text or self.echo):
            raise ValueError("return_full_text and echo apply to complete answers; omit them with stream=true")
        return self
