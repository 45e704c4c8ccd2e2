"""What a request's outputs look like in OpenAI's shape, whole and streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest
from fastgen_jax.serving.tools import ToolReader, merge_calls
from fastgen_jax.serving.work import Work
from fastgen_jax.text import Tokenizer

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once, because every token passes it


class TokenTexts:
    """How single tokens are spelled in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """Its text; `bytes:\\xe2` for a piece of a character, and the id where there is no tokenizer."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        data = self._tokenizer.visible_bytes(token_id, skip_special_tokens=False)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token_id: int) -> list[int] | None:
        """Its bytes."""
        if self._tokenizer is None:
            return None
        return list(self._tokenizer.visible_bytes(token_id, skip_special_tokens=False))


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI gives this for what was impossible."""
    return max(logprob, -9999.0)


class CompletionAnswer:
    """Answers POST /v1/completions."""

    object = "text_completion"

    def __init__(self, body: CompletionRequest, work: Work, tokenizer: Tokenizer | None) -> None:
        self.body, self.work, self.tokenizer = body, work, tokenizer
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "object": self.object, "created": int(time.time()), "model": body.model}
        self._texts = TokenTexts(tokenizer)
        self._offsets = [0] * len(work.streams)
        self._started = [False] * len(work.streams)

    def chunk(self, index: int, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """The choices that `outputs` of sample `index` add; in a stream each is a message of its own."""
        text = "" if self.body.max_tokens == 0 else "".join(output.text for output in outputs)
        entries = [entry for output in outputs for entry in output.logprobs or ()]
        if self.body.max_tokens == 0:
            entries = []
        prompt: list[TokenLogprob | int] = []
        if self.body.echo and not self._started[index]:
            ids = self.work.prompts[index // self.work.samples_a_prompt]
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

    def whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer that all chunks make together."""
        choices: list[dict[str, Any]] = []
        for index in range(len(self.work.streams)):
            mine = [chunk for chunk in chunks if chunk["index"] == index]
            logprobs = None
            if self.body.logprobs is not None:
                logprobs = {
                    name: [x for chunk in mine for x in chunk["logprobs"][name]]
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
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

    def usage(self) -> dict[str, Any]:
        """Tokens of the request, without the one that `max_tokens=0` had to generate."""
        usage = self.work.usage()
        if self.body.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def encoder(self) -> SseEncoder:
        """Makes the messages of a stream."""
        return SseEncoder(self._head)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob | int]) -> dict[str, Any]:
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            first = isinstance(entry, int)  # the prompt's first token follows nothing, so it has no probability
            text = self._texts.text(entry if first else entry.token_id)
            result["tokens"].append(text)
            result["token_logprobs"].append(None if first else finite(entry.logprob))
            result["top_logprobs"].append(None if first else self._top(entry))
            result["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return result

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text, of which several tokens may have the same: the likeliest counts, but before all the sampled one."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top.items():
            top.setdefault(self._texts.text(token_id), finite(logprob))
        return top | {self._texts.text(entry.token_id): finite(entry.logprob)}


class ChatAnswer:
    """Answers POST /v1/chat/completions."""

    object = "chat.completion"

    def __init__(self, body: ChatRequest, work: Work, tokenizer: Tokenizer | None) -> None:
        self.body, self.work, self.tokenizer = body, work, tokenizer
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {"id": self.id, "object": kind, "created": int(time.time()), "model": body.model}
        self._texts = TokenTexts(tokenizer)
        self._started = [False] * len(work.streams)
        uses_tools = bool(body.tools) and body.tool_choice != "none"
        self._readers = [ToolReader(body) if uses_tools else None for _ in work.streams]

    def chunk(self, index: int, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """The choices that `outputs` of sample `index` add; in a stream each is a message of its own."""
        finished = outputs[-1].finished
        finish = outputs[-1].finish_reason if finished else None
        delta: dict[str, Any] = {"content": "".join(output.text for output in outputs)}
        reader = self._readers[index]
        if reader is not None:
            content, calls = reader.push(delta["content"])
            if finished:
                rest, more = reader.flush()
                content, calls = content + rest, calls + more
            delta = {"content": content} if content else {}
            if calls:
                delta["tool_calls"] = calls
            if finish == "stop" and reader.num_calls:
                finish = "tool_calls"
        if not self._started[index]:
            self._started[index] = True
            delta = {"role": "assistant", **delta}
        logprobs = None
        if self.body.logprobs:
            logprobs = {"content": [self._logprob(e) for output in outputs for e in output.logprobs or ()]}
        return [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]

    def whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer that all chunks make together."""
        choices: list[dict[str, Any]] = []
        for index in range(len(self.work.streams)):
            mine = [chunk for chunk in chunks if chunk["index"] == index]
            calls = merge_calls([call for chunk in mine for call in chunk["delta"].get("tool_calls", ())])
            content = "".join(chunk["delta"].get("content", "") for chunk in mine)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": content if content or not calls else None,
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = calls
            logprobs = None
            if self.body.logprobs:
                logprobs = {"content": [entry for chunk in mine for entry in chunk["logprobs"]["content"]]}
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": mine[-1]["finish_reason"]}
            )
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the request."""
        return self.work.usage()

    def encoder(self) -> SseEncoder:
        """Makes the messages of a stream."""
        return SseEncoder(self._head)

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        def spelled(token_id: int, logprob: float) -> dict[str, Any]:
            return {"token": self._texts.text(token_id), "logprob": finite(logprob), "bytes": self._texts.bytes(token_id)}

        # Behind the likeliest comes the sampled one if it is none of them.
        top = entry.top | {entry.token_id: entry.logprob} if entry.top else {}
        return {**spelled(entry.token_id, entry.logprob), "top_logprobs": [spelled(i, value) for i, value in top.items()]}


class SseEncoder:
    """Server-sent events of one answer; what is the same in all of them is encoded once."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = ("data: " + json.dumps(head)[:-1]).encode()

    def choices(self, choices: list[dict[str, Any]], *, usage: dict[str, int] | bool) -> bytes:
        """One event. `usage` is what it has to say about tokens; True: null, because a last event will say it."""
        tail = b"}\n\n" if usage is False else b',"usage":null}\n\n'
        if isinstance(usage, dict):
            tail = b',"usage":' + json.dumps(usage).encode() + b"}\n\n"
        return self._head + b',"choices":' + _encode(choices).encode() + tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event before the last."""
        return self._head + b',"choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\n"

    @staticmethod
    def error(body: dict[str, Any]) -> bytes:
        """An event that says what went wrong, after the answer had begun."""
        return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
