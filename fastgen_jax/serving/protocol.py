"""The bodies of requests, checked by pydantic. What is unknown is refused; what is known and unsupported says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.scheduling.request import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from fastgen_jax.engine.intake import Intake

MAX_CHOICES = 128  # samples of one prompt
MAX_STOPS = 16
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
# Fields of a body that `SamplingParams` has too.
_SAME_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "stop",
    "stop_token_ids",
)


def short(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of many digits, or a very deep list
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


class Body(BaseModel):
    """Refuses fields that it does not have."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: Annotated[bool, Field(description="Extension: the usage so far in every event.")] = False
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A named schema; it is always enforced, whatever `strict` says."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and to no other")
        return self


class Sampling(Body):
    """What completions and chat have in common; those after `seed` are extensions."""

    # Fields of OpenAI's interface that would change the answer and are not supported -> values that ask for nothing.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    user: str | None = Field(None, description="Who asks; written to the log.")
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="Extension: -1 and 0 keep every token.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(None, description="Extension.")
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="Extension: least tokens before an end.")
    ignore_eos: bool | None = Field(None, description="Extension.")
    stop_token_ids: list[TokenId] | None = Field(None, description="Extension.")
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = Field(0, description="Extension: lower runs first.")
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="Extension: seconds until it is given up.")

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < 2**31):
                raise ValueError(f"logit_bias has the key {key[:100]!r}; keys are token ids, such as '50256'")
        return value

    @model_validator(mode="after")
    def _supported(self) -> Sampling:
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value not in neutral:
                raise ValueError(f"{name}={short(value)} is not supported here; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to stream=true; leave them out")
        return self

    @property
    def num_choices(self) -> int:
        """Samples of each prompt."""
        return self.n or 1

    def sampling_params(self, intake: Intake, *, max_new_tokens: int | None, **more: Any) -> SamplingParams:
        """As the engine wants them, with the model's defaults for what is left out; n belongs to the caller.

        ValueError for what contradicts itself.
        """
        options = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            "logit_bias": self.logit_bias and {int(key): value for key, value in self.logit_bias.items()},
            "seed": None if self.seed is None else self.seed % 2**32,
            **{name: getattr(self, name) for name in _SAME_NAMES},
            **more,
        }
        return intake.sampling_params(options)


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    NEUTRAL: ClassVar = {"suffix": (None, "")}

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(max_length=10_000_000)
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError(f"best_of={self.best_of} is not supported unless it equals n={self.num_choices}; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 asks for nothing; raise it, or set echo=true for the prompt alone")
        if not self.prompts:
            raise ValueError("prompt is empty; give at least one")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType] (all are ints: pydantic has checked)
        return list(self.prompt)  # pyright: ignore[reportReturnType] (texts, or lists of ints)


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Which function."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    NEUTRAL: ClassVar = {
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "functions": (None,),
        "function_call": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "metadata": (None, {}),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension: variables of the chat template.")
    store: Any = None
    service_tier: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    metadata: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not in tools: {names}")
        if self.forces_tool and self.response_format and self.response_format.type != "text":
            raise ValueError("a forced tool call is JSON already; leave response_format out")
        return self

    @property
    def told_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forces_tool(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation with what else of a chat becomes part of its prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        for name in ("tools", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name):
                raise ValueError(f"{name} belong to messages; leave them out")
        return self

    @property
    def told_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return self.tools or []


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class GenerateRequest(BaseModel):
    """POST /mii/{deployment}: prompts and generation options, the fields of `SamplingParams`."""

    model_config = ConfigDict(extra="allow")

    prompts: str | list[str] | list[TokenId] | list[list[TokenId]] | list[list[dict[str, Any]]] | list[dict[str, Any]]
    stream: bool = False
    return_full_text: bool = False
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    timeout: Annotated[float, Field(gt=0)] | None = None
