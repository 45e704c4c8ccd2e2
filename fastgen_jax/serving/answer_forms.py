"""The parts of answers to completions and chats in OpenAI's format."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from fastgen_jax.serving.tools import CallDelta, ToolCall


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completion: parallel lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    log_kept_masses: NotRequired[list[float | None]]
    """With `logprobs_mode` "processed": an extension."""


class PromptLogprob(TypedDict):
    """Log-probability of a token at one position of a prompt, in vLLM's format."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One entry per token of a prompt: by token id, first that token, then the most likely ones. None for the first token."""


class CompletionChoice(TypedDict):
    """One sample of a completion, or one streamed piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatLogprob(TypedDict):
    """Log-probability of one token of a chat."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: NotRequired[list[ChatLogprob]]
    log_kept_mass: NotRequired[float]
    """With `logprobs_mode` "processed": an extension."""


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat."""

    content: list[ChatLogprob]


class ChatDelta(TypedDict, total=False):
    """What a streamed piece adds to a message."""

    role: str
    content: str
    reasoning_content: str
    reasoning: str
    tool_calls: list[CallDelta]


class ChatChoice(TypedDict):
    """One streamed piece of a sample of a chat."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class ChatMessage(TypedDict):
    """The complete message of a sample."""

    role: str
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    """The name of DeepSeek, SGLang and llama.cpp."""
    reasoning: NotRequired[str]
    """The same text under the name of vLLM and OpenRouter."""
    tool_calls: NotRequired[list[ToolCall]]
