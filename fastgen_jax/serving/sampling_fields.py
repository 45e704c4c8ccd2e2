"""The fields that completions and chats share, validated by pydantic. Known but unsupported ones are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.scheduling.request import MAX_TOP_LOGPROBS, LogprobsMode
from fastgen_jax.serving.fields import (
    MAX_CHOICES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    Body,
    Seed,
    StopString,
    TokenId,
    check_neutral,
)
from fastgen_jax.serving.guided import Guided

if TYPE_CHECKING:
    from fastgen_jax.engine.intake import Intake

NO_TOP = "{name}={value} requests other tokens, whose log-probabilities are raw only; {remedy} with logprobs_mode=processed"
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
    "logprobs_mode",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "bad_words",
    "allowed_token_ids",
)
MAX_BEAMS = MAX_TOP_LOGPROBS // 2  # each beam is continued with twice as many tokens as there are beams
# Fields that have no meaning in a search for the most likely answers -> their values that change nothing.
_WITHOUT_BEAMS: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "best_of": (),
    "echo": (False,),
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "stop": ([],),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logprobs_mode": (),
    "prompt_logprobs": (),
}


class StreamOptions(Body):
    """Options of a streamed response."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[
        bool | None,
        Field(description="Extension: send the token counts so far in every event, unless include_usage is false."),
    ] = None
    include_timing: Annotated[bool | None, Field(description="Extension: send the times in the last event.")] = None
    include_obfuscation: Annotated[bool | None, Field(description="Means nothing here.")] = None

    @property
    def counts_in_each_event(self) -> bool:
        """Whether every event has the token counts so far."""
        return bool(self.continuous_usage_stats) and self.include_usage is not False


class Sampling(Guided):
    """Fields common to completions and chats. Those described as extensions are not in OpenAI's API."""

    # Unsupported fields -> values that change nothing and are therefore accepted.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "store": (None, False),
        "logits_processors": (None, []),
        "kv_transfer_params": (None,),
        "mm_processor_kwargs": (None, {}),
        "vllm_xargs": (None, {}),
    }

    model: str | None = Field(None, description="The served model if omitted, as in vLLM.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Samples of which the n with the highest mean log-probability are returned."
    )
    use_beam_search: bool | None = Field(None, description="Extension: return the n most likely answers that are found.")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(
        None, description="Extension: a power of the length, by which beam search divides log-probabilities; 1 by default."
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    user: str | None = Field(None, description="Identifies the end user; written to the log.")
    metadata: JsonObject | None = Field(None, description="Means nothing here.")
    prompt_cache_key: str | None = Field(None, description="Means nothing here: prefixes are found by their tokens.")
    prompt_cache_retention: str | None = Field(None, description="Means nothing here.")
    prompt_cache_options: JsonObject | None = Field(None, description="Means nothing here.")
    safety_identifier: str | None = Field(None, description="Means nothing here.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = Field(
        None, description="Means nothing here: the answer's service_tier is default."
    )
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="Extension: -1 and 0 keep all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(None, description="Extension.")
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Extension: minimum number of tokens before the end."
    )
    ignore_eos: bool | None = Field(None, description="Extension.")
    stop_token_ids: list[TokenId] | None = Field(None, description="Extension.")
    logprobs_mode: LogprobsMode | None = Field(
        None,
        description='Extension: "processed" reports the log-probabilities after temperature, top_k, top_p and min_p, with '
        "which tokens are drawn, and the logarithm of the probability that the last three kept.",
    )
    include_stop_str_in_output: bool | None = Field(None, description="Extension: the text ends with the stop string.")
    skip_special_tokens: bool | None = Field(None, description="Extension: false shows special tokens in the text.")
    spaces_between_special_tokens: bool | None = Field(None, description="Means nothing here.")
    bad_words: list[str] | None = Field(None, description="Extension: texts that the answer must not contain.")
    allowed_token_ids: list[TokenId] | None = Field(None, description="Extension: no other token is sampled.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Extension: keep only this many tokens at the end of the prompt; -1: as many as the model takes."
    )
    return_token_ids: bool | None = Field(None, description="Extension: return the token ids of prompt and answer.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Extension: log-probabilities name tokens as token_id:7."
    )
    cache_salt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Extension: cached prefixes are shared only with requests that have the same salt."
    )
    request_id: Annotated[str, StringConstraints(pattern=r"^[\w.:-]{1,128}$")] | None = Field(
        None, description="Extension: the id of the answer ends with it."
    )
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = Field(0, description="Extension: lower values run first.")
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Extension: return the log-probabilities of the prompt's tokens, and of this many others at each."
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Extension: seconds until the request is aborted."
    )
    store: object = None
    logits_processors: object = None
    kv_transfer_params: object = None
    mm_processor_kwargs: object = None
    vllm_xargs: object = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < 2**31):
                raise ValueError(f"logit_bias has the key {key[:100]!r}; keys must be token ids, such as '50256'")
        return value

    @field_validator("stop")
    @classmethod
    def _not_too_long(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value and sum(map(len, value)) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop has {sum(map(len, value))} characters in all, more than {MAX_STOP_CHARACTERS}; keep the most likely"
            )
        return value

    @model_validator(mode="after")
    def _supported(self) -> Sampling:
        check_neutral(self, self.NEUTRAL)
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError(
                f"prompt_logprobs={self.prompt_logprobs} belong to complete answers; set stream=false, or remove them"
            )
        if self.prompt_logprobs and self.logprobs_mode == "processed":
            raise ValueError(
                NO_TOP.format(name="prompt_logprobs", value=self.prompt_logprobs, remedy="use prompt_logprobs=0")
            )
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options require stream=true; set it, or remove them")
        if self.best_of is not None and self.best_of < self.num_choices:
            raise ValueError(f"best_of={self.best_of} is less than n={self.num_choices}; raise it, or remove it")
        if self.selects and self.stream:
            raise ValueError(f"best_of={self.best_of} selects among complete answers; set stream=false, or best_of=n")
        if self.use_beam_search:
            self._check_beam_search()
        elif self.length_penalty is not None and self.length_penalty != 1:
            raise ValueError(f"length_penalty={self.length_penalty} requires use_beam_search=true; set it, or remove it")
        return self

    def _check_beam_search(self) -> None:
        if self.num_choices > MAX_BEAMS:
            raise ValueError(f"n={self.num_choices} is too large for beam search; use at most {MAX_BEAMS}")
        for name, neutral in _WITHOUT_BEAMS.items():
            if getattr(self, name, None) not in (None, *neutral):
                raise ValueError(f"{name} cannot be combined with use_beam_search; remove one of them")
        logprobs = getattr(self, "logprobs", None)
        if logprobs is not None and logprobs is not False:  # 0 asks for those of the tokens
            raise ValueError("logprobs cannot be combined with use_beam_search; remove one of them")
        if self.is_guided:
            raise ValueError(f"{next(iter(self.constraints))} cannot be combined with use_beam_search; remove one of them")

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def num_samples(self) -> int:
        """Samples of each prompt, of which `num_choices` are returned."""
        return self.best_of or self.num_choices

    @property
    def selects(self) -> bool:
        """Whether more samples are drawn than returned."""
        return self.num_samples > self.num_choices

    @property
    def names(self) -> JsonFields:
        """The client's names of `SamplingParams`' fields that have others there, for messages."""
        limit = "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"
        return {"max_new_tokens": limit, "min_new_tokens": "min_tokens"}

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
