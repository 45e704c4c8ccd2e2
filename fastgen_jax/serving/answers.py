"""OpenAI's response format for completions and chats, complete and streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest
from fastgen_jax.serving.tool_formats.pieces import Piece, Reader
from fastgen_jax.serving.tools import CallDelta, CallWriter, ToolCall, merge_calls
from fastgen_jax.serving.work import TokenUsage, Usage, Work
from fastgen_jax.text import Tokenizer

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # built once: it runs for every token


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completion: parallel lists with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One sample of a completion, or one streamed piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class ChatLogprob(TypedDict):
    """Log-probability of one token of a chat."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: NotRequired[list[ChatLogprob]]


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


class TokenTexts:
    """Spells single tokens in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """Returns the token's text: `bytes:\\xe2` for part of a character, `token_id:7` without a tokenizer."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        data = self._tokenizer.visible_bytes(token_id, skip_special_tokens=False)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token_id: int) -> list[int] | None:
        """Returns the token's bytes; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return list(self._tokenizer.visible_bytes(token_id, skip_special_tokens=False))


def finite(logprob: float) -> float:
    """Limits a log-probability to -9999, OpenAI's value for impossible tokens: JSON has no infinity."""
    return max(logprob, -9999.0)


class CompletionAnswer:
    """Builds the response to POST /v1/completions."""

    object = "text_completion"

    def __init__(self, body: CompletionRequest, work: Work, tokenizer: Tokenizer | None) -> None:
        self.body, self.work, self.tokenizer = body, work, tokenizer
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "object": self.object, "created": int(time.time()), "model": body.model}
        self._texts = TokenTexts(tokenizer)
        self._offsets = [0] * len(work.streams)
        self._started = [False] * len(work.streams)

    def chunk(self, index: int, outputs: Sequence[RequestOutput]) -> list[CompletionChoice]:
        """Returns the choice that `outputs` of sample `index` add; a stream sends it as one event."""
        text = "" if self.body.max_tokens == 0 else "".join(output.text for output in outputs)
        entries = [entry for output in outputs for entry in output.logprobs or ()]
        if self.body.max_tokens == 0:
            entries = []
        prompt: list[TokenLogprob | int] = []
        if self.body.echo and not self._started[index]:
            ids = self.work.prompts[index // self.work.samples_per_prompt]
            text = (self.tokenizer.decode(list(ids), skip_special_tokens=False) if self.tokenizer else "") + text
            if self.body.logprobs is not None:
                prompt = [ids[0], *(outputs[0].prompt_logprobs or ())]
        self._started[index] = True
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs(index, [*prompt, *entries])
        finish = outputs[-1].finish_reason if outputs[-1].finished else None
        if finish and self.body.max_tokens == 0:
            finish = "length"
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}]

    async def collect(self) -> dict[str, object]:
        """Waits until all samples have finished; returns the complete response."""
        chunks = [choice async for index, outputs in self.work for choice in self.chunk(index, outputs)]
        choices: list[CompletionChoice] = []
        for index in range(len(self.work.streams)):
            mine = [chunk for chunk in chunks if chunk["index"] == index]
            logprobs: CompletionLogprobs | None = None
            if self.body.logprobs is not None:
                parts = [chunk["logprobs"] for chunk in mine if chunk["logprobs"] is not None]
                logprobs = {
                    "tokens": [x for part in parts for x in part["tokens"]],
                    "token_logprobs": [x for part in parts for x in part["token_logprobs"]],
                    "top_logprobs": [x for part in parts for x in part["top_logprobs"]],
                    "text_offset": [x for part in parts for x in part["text_offset"]],
                }
            choices.append(
                {
                    "index": index,
                    "text": "".join(chunk["text"] for chunk in mine),
                    "logprobs": logprobs,
                    "finish_reason": mine[-1]["finish_reason"],
                }
            )
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> Usage:
        """Returns the request's token counts, without the token that `max_tokens=0` had to generate."""
        usage = self.work.usage()
        if self.body.max_tokens == 0:
            usage["completion_tokens"], usage["total_tokens"] = 0, usage["prompt_tokens"]
        return usage

    def encoder(self) -> SseEncoder:
        """Returns the encoder of this response's events."""
        return SseEncoder(self._head)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob | int]) -> CompletionLogprobs:
        result: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            # The prompt's first token, a plain id, follows nothing, so it has no probability.
            text = self._texts.text(entry if isinstance(entry, int) else entry.token_id)
            result["tokens"].append(text)
            result["token_logprobs"].append(None if isinstance(entry, int) else finite(entry.logprob))
            result["top_logprobs"].append(None if isinstance(entry, int) else self._top(entry))
            result["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return result

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text. Of tokens with the same text the sampled one counts, otherwise the most likely."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top.items():
            top.setdefault(self._texts.text(token_id), finite(logprob))
        return top | {self._texts.text(entry.token_id): finite(entry.logprob)}


class ChatAnswer:
    """Builds the response to POST /v1/chat/completions."""

    object = "chat.completion"

    def __init__(
        self,
        body: ChatRequest,
        work: Work,
        tokenizer: Tokenizer | None,
        make_reader: Callable[[], Reader | None] = lambda: None,
    ) -> None:
        """`make_reader` makes a reader of the text of one sample; None: all of the text is content."""
        self.body, self.work, self.tokenizer = body, work, tokenizer
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {"id": self.id, "object": kind, "created": int(time.time()), "model": body.model}
        self._texts = TokenTexts(tokenizer)
        self._started = [False] * len(work.streams)
        self._readers = [make_reader() for _ in work.streams]
        self._writers = [CallWriter() for _ in work.streams]
        self._num_reasoning = 0

    def chunk(self, index: int, outputs: Sequence[RequestOutput]) -> list[ChatChoice]:
        """Returns the choice that `outputs` of sample `index` add; a stream sends it as one event."""
        finished = outputs[-1].finished
        finish = outputs[-1].finish_reason if finished else None
        text = "".join(output.text for output in outputs)
        delta: ChatDelta = {"content": text}
        reader = self._readers[index]
        if reader is not None:
            pieces = reader.push(text)
            if finished:
                pieces += reader.flush()
            delta = self._delta(index, pieces)
            if reader.is_reasoning:
                self._num_reasoning += sum(len(output.new_token_ids) for output in outputs)
            if finish == "stop" and reader.num_calls:
                finish = "tool_calls"
        if not self._started[index]:
            self._started[index] = True
            delta = {"role": "assistant", **delta}
        logprobs: ChatLogprobs | None = None
        if self.body.logprobs:
            logprobs = {"content": [self._logprob(e) for output in outputs for e in output.logprobs or ()]}
        return [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]

    async def collect(self) -> dict[str, object]:
        """Waits until all samples have finished; returns the complete response."""
        chunks = [choice async for index, outputs in self.work for choice in self.chunk(index, outputs)]
        choices: list[dict[str, object]] = []
        for index in range(len(self.work.streams)):
            mine = [chunk for chunk in chunks if chunk["index"] == index]
            calls = merge_calls([call for chunk in mine for call in chunk["delta"].get("tool_calls", ())])
            content = "".join(chunk["delta"].get("content", "") for chunk in mine)
            thoughts = "".join(chunk["delta"].get("reasoning", "") for chunk in mine)
            message: ChatMessage = {
                "role": "assistant",
                "content": content if content or not (calls or thoughts) else None,
                "refusal": None,
            }
            if thoughts:
                message["reasoning_content"] = message["reasoning"] = thoughts
            if calls:
                message["tool_calls"] = calls
            logprobs: ChatLogprobs | None = None
            if self.body.logprobs:
                parts = [chunk["logprobs"] for chunk in mine if chunk["logprobs"] is not None]
                logprobs = {"content": [entry for part in parts for entry in part["content"]]}
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": mine[-1]["finish_reason"]}
            )
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> Usage:
        """Returns the request's token counts."""
        usage = self.work.usage()
        if any(self._readers):
            usage["completion_tokens_details"] = {"reasoning_tokens": self._num_reasoning}
        return usage

    def _delta(self, index: int, pieces: Sequence[Piece]) -> ChatDelta:
        delta: ChatDelta = {}
        content = "".join(piece.text for piece in pieces if piece.kind == "content")
        thoughts = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        calls = self._writers[index].deltas(pieces)
        if thoughts and self.body.include_reasoning is not False:
            delta["reasoning_content"] = delta["reasoning"] = thoughts
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = calls
        return delta

    def encoder(self) -> SseEncoder:
        """Returns the encoder of this response's events."""
        return SseEncoder(self._head)

    def _logprob(self, entry: TokenLogprob) -> ChatLogprob:
        def spelled(token_id: int, logprob: float) -> ChatLogprob:
            return {"token": self._texts.text(token_id), "logprob": finite(logprob), "bytes": self._texts.bytes(token_id)}

        # The sampled token comes last if it is not among the most likely.
        top = entry.top | {entry.token_id: entry.logprob} if entry.top else {}
        return {**spelled(entry.token_id, entry.logprob), "top_logprobs": [spelled(i, value) for i, value in top.items()]}


class SseEncoder:
    """Encodes the server-sent events of one response; their common part is encoded once."""

    def __init__(self, head: Mapping[str, object]) -> None:
        self._head = ("data: " + json.dumps(head)[:-1]).encode()

    def choices(self, choices: Sequence[CompletionChoice | ChatChoice], *, usage: TokenUsage | bool) -> bytes:
        """Returns one event with its token counts; `usage=True` writes null, because a final event has the counts."""
        tail = b"}\n\n" if usage is False else b',"usage":null}\n\n'
        if not isinstance(usage, bool):
            tail = b',"usage":' + json.dumps(usage).encode() + b"}\n\n"
        return self._head + b',"choices":' + _encode(choices).encode() + tail

    def usage(self, usage: Usage) -> bytes:
        """Returns the event before the last, with the final token counts."""
        return self._head + b',"choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\n"

    @staticmethod
    def error(body: Mapping[str, object]) -> bytes:
        """Returns the event that reports an error after the response has started."""
        return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
