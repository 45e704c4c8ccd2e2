"""Request bodies, validated by pydantic. Unknown fields are refused, and so are known but unsupported ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from fastgen_jax.json_types import JsonObject
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.scheduling.request import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from fastgen_jax.engine.intake import Intake

MAX_CHOICES = 128  # samples of one prompt
MAX_STOPS = 16
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
# Fields with the same names in `SamplingParams`.
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


def short(value: object) -> str:
    """Returns a value as error messages show it: at most 100 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with too many digits, or a list nested too deeply
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


class Body(BaseModel):
    """Base of the bodies; refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a streamed response."""

    include_usage: bool = False
    continuous_usage_stats: Annotated[bool, Field(description="Extension: send the token counts so far in every event.")] = (
        False
    )
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A named schema. It is always enforced, whatever `strict` is."""

    name: str = "answer"
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and type 'json_schema' belong together; set both or neither")
        return self


class Sampling(Body):
    """Fields common to completions and chats. Those described as extensions are not in OpenAI's API."""

    # Unsupported fields of OpenAI's API -> values that change nothing and are therefore accepted.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {}

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
    user: str | None = Field(None, description="Identifies the end user; written to the log.")
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="Extension: -1 and 0 keep all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(None, description="Extension.")
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Extension: minimum number of tokens before the end."
    )
    ignore_eos: bool | None = Field(None, description="Extension.")
    stop_token_ids: list[TokenId] | None = Field(None, description="Extension.")
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = Field(0, description="Extension: lower values run first.")
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Extension: seconds until the request is aborted."
    )

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < 2**31):
                raise ValueError(f"logit_bias has the key {key[:100]!r}; keys must be token ids, such as '50256'")
        return value

    @model_validator(mode="after")
    def _supported(self) -> Sampling:
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value not in neutral:
                raise ValueError(f"{name}={short(value)} is not supported here; remove it")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options require stream=true; set it, or remove them")
        return self

    @property
    def num_choices(self) -> int:
        """Samples of each prompt."""
        return self.n or 1

    def sampling_params(self, intake: Intake, *, max_new_tokens: int | None, **more: object) -> SamplingParams:
        """Returns the engine's parameters, with the model's defaults for omitted fields; n is left to the caller.

        Raises ValueError for contradictory values.
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
            raise ValueError(f"best_of={self.best_of} is not supported unless it equals n={self.num_choices}; remove it")
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


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

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
        "verbosity": (None,),
        "web_search_options": (None,),
        "metadata": (None, {}),
    }

    messages: Annotated[list[JsonObject], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="Extension: variables for the chat template.")
    store: object = None
    service_tier: object = None
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
    verbosity: object = None
    web_search_options: object = None
    metadata: object = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; pass only one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs=true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice requires tools")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not in tools: {names}")
        if self.forces_tool and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format cannot be combined with a forced tool call, which is JSON already; remove it")
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


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation with the fields of a chat that become part of its prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[JsonObject], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: JsonObject | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("pass either prompt or messages")
        for name in ("tools", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name):
                raise ValueError(f"{name} require messages; remove them")
        return self

    @property
    def described_tools(self) -> list[Tool]:
        """The tools that are described to the model."""
        return self.tools or []


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
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    timeout: Annotated[float, Field(gt=0)] | None = None
