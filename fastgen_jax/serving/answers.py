"""OpenAI's response format for completions and chats, complete and streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
from fastgen_jax.serving.answer_forms import (
    ChatChoice,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
)
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest
from fastgen_jax.serving.samples import Scores, TextOffsets
from fastgen_jax.serving.sampling_fields import Sampling
from fastgen_jax.serving.tool_formats.pieces import Piece, Reader
from fastgen_jax.serving.tools import CALL_ID_LENGTH, CallWriter, merge_calls
from fastgen_jax.serving.work import Milliseconds, TokenUsage, Usage, Work
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.messages import checked_messages, text_of

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # built once: it runs for every token


class TokenTexts:
    """Spells single tokens in log-probabilities; with `as_ids`, all as `token_id:7`."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def text(self, token_id: int) -> str:
        """Returns the token's text: `bytes:\\xe2` for part of a character, `token_id:7` without a tokenizer."""
        if self._as_ids or self._tokenizer is None:
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


def reported(entry: TokenLogprob, body: Sampling) -> float:
    """The log-probability of a token that a request wants: raw, or processed."""
    processed = entry.processed_logprob if body.logprobs_mode == "processed" else None
    return finite(entry.logprob if processed is None else processed)


def prompt_logprobs_of(outputs: Sequence[RequestOutput], body: Sampling, texts: TokenTexts) -> PromptLogprobs | None:
    """The log-probabilities of a prompt, from the first outputs of a sample; None if the request does not want them."""
    number = body.prompt_logprobs
    if number is None:
        return None
    positions: PromptLogprobs = [None]  # the first token follows nothing
    for entry in outputs[0].prompt_logprobs or ():
        top = [*entry.top.items()][:number]
        told = [(entry.token_id, reported(entry, body), entry.rank)]
        told += [(id, finite(value), rank) for rank, (id, value) in enumerate(top, 1) if id != entry.token_id]
        positions.append(
            {str(id): {"logprob": value, "rank": rank, "decoded_token": texts.text(id)} for id, value, rank in told}
        )
    return positions


def head_of(body: Sampling, kind: str, object: str, fingerprint: str | None) -> dict[str, object]:
    """The fields that the response and every event start with."""
    head = {
        "id": f"{kind}-{body.request_id or uuid.uuid4().hex}",
        "object": object,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": fingerprint,
    }
    return head if body.service_tier is None else {**head, "service_tier": "default"}


class CompletionAnswer:
    """Builds the response to POST /v1/completions."""

    object = "text_completion"

    def __init__(
        self, body: CompletionRequest, work: Work, tokenizer: Tokenizer | None, *, fingerprint: str | None = None
    ) -> None:
        self.body, self.work, self.tokenizer = body, work, tokenizer
        self._head = head_of(body, "cmpl", self.object, fingerprint)
        self._texts = TokenTexts(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._scores = Scores(body, len(work.streams))
        echo, every = bool(body.echo), work.samples_per_prompt
        numbers = range(len(work.streams)) if body.logprobs is not None else ()
        self._offsets = [TextOffsets(tokenizer, work.prompts[i // every], echo=echo) for i in numbers]
        self._started = [False] * len(work.streams)

    def chunk(self, index: int, outputs: Sequence[RequestOutput]) -> list[CompletionChoice]:
        """Returns the choice that `outputs` of sample `index` add; a stream sends it as one event."""
        text = "" if self.body.max_tokens == 0 else "".join(output.text for output in outputs)
        entries = [entry for output in outputs for entry in output.logprobs or ()]
        if self.body.max_tokens == 0:
            entries = []
        prompt: list[TokenLogprob | int] = []
        self._scores.add(index, outputs)
        is_first, ids = not self._started[index], self.work.prompts[index // self.work.samples_per_prompt]
        if self.body.echo and is_first:
            text = (self.tokenizer.decode(list(ids), skip_special_tokens=False) if self.tokenizer else "") + text
            if self.body.logprobs is not None:
                prompt = [ids[0], *(outputs[0].prompt_logprobs or ())]
        self._started[index] = True
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs(index, prompt, entries)
        finish = outputs[-1].finish_reason if outputs[-1].finished else None
        if finish and self.body.max_tokens == 0:
            finish = "length"
        choice: CompletionChoice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if finish:
            choice["stop_reason"] = outputs[-1].stop_reason if finish == "stop" else None
        if is_first and (prompt_logprobs := prompt_logprobs_of(outputs, self.body, self._texts)) is not None:
            choice["prompt_logprobs"] = prompt_logprobs
        if self.body.return_token_ids:
            choice["token_ids"] = [i for o in outputs for i in o.new_token_ids] if self.body.max_tokens != 0 else []
            if is_first:
                choice["prompt_token_ids"] = list(ids)
        return [choice]

    async def collect(self) -> dict[str, object]:
        """Waits until all samples have finished; returns the complete response."""
        chunks = [choice async for index, outputs in self.work for choice in self.chunk(index, outputs)]
        choices: list[CompletionChoice] = []
        for position, index in enumerate(self._scores.chosen()):
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
                if self.body.logprobs_mode == "processed":
                    logprobs["log_kept_masses"] = [x for part in parts for x in part.get("log_kept_masses", ())]
            choices.append(
                {
                    **mine[-1],
                    "index": position,
                    "text": "".join(chunk["text"] for chunk in mine),
                    "logprobs": logprobs,
                }
            )
            if "prompt_logprobs" in mine[0]:
                choices[-1]["prompt_logprobs"] = mine[0]["prompt_logprobs"]
            if self.body.return_token_ids:
                choices[-1]["prompt_token_ids"] = mine[0].get("prompt_token_ids", [])
                choices[-1]["token_ids"] = [i for chunk in mine for i in chunk.get("token_ids", ())]
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

    def _logprobs(
        self, index: int, prompt: Sequence[TokenLogprob | int], entries: Sequence[TokenLogprob]
    ) -> CompletionLogprobs:
        result: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offsets = self._offsets[index]
        for number, entry in enumerate([*prompt, *entries]):
            # The prompt's first token, a plain id, follows nothing, so it has no probability.
            token_id = entry if isinstance(entry, int) else entry.token_id
            result["tokens"].append(self._texts.text(token_id))
            result["token_logprobs"].append(None if isinstance(entry, int) else reported(entry, self.body))
            result["top_logprobs"].append(None if isinstance(entry, int) else self._top(entry))
            result["text_offset"].append(offsets.start_of(token_id, in_prompt=number < len(prompt)))
        if self.body.logprobs_mode == "processed":
            masses = [None if isinstance(entry, int) else entry.log_kept_mass for entry in (*prompt, *entries)]
            result["log_kept_masses"] = masses
        return result

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text. Of tokens with the same text the sampled one counts, otherwise the most likely."""
        if not self.body.logprobs:
            return {}
        top: dict[str, float] = {}
        for token_id, logprob in [*entry.top.items()][: self.body.logprobs]:
            top.setdefault(self._texts.text(token_id), finite(logprob))
        return top | {self._texts.text(entry.token_id): reported(entry, self.body)}


class ChatAnswer:
    """Builds the response to POST /v1/chat/completions."""

    object = "chat.completion"

    def __init__(
        self,
        body: ChatRequest,
        work: Work,
        tokenizer: Tokenizer | None,
        *,
        make_reader: Callable[[], Reader | None] = lambda: None,
        id_length: int = CALL_ID_LENGTH,
        fingerprint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`make_reader` makes a reader of the text of one sample; None: all of the text is content. `id_length` is that of
        the ids of calls, and `headers` are those of the response."""
        self.body, self.work, self.tokenizer = body, work, tokenizer
        self.headers = dict(headers or {})
        self._head = head_of(body, "chatcmpl", f"{self.object}.chunk" if body.stream else self.object, fingerprint)
        self._texts = TokenTexts(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._scores = Scores(body, len(work.streams))
        self._before = text_of(checked_messages(body.messages[-1:])[0]["content"]) if body.echo else ""
        self._started = [False] * len(work.streams)
        self._readers = [make_reader() for _ in work.streams]
        self._writers = [CallWriter(id_length) for _ in work.streams]
        self._num_reasoning = 0
        self._prompt_logprobs: PromptLogprobs | None = None

    def chunk(self, index: int, outputs: Sequence[RequestOutput]) -> list[ChatChoice]:
        """Returns the choice that `outputs` of sample `index` add; a stream sends it as one event."""
        finished = outputs[-1].finished
        finish = outputs[-1].finish_reason if finished else None
        text = "".join(output.text for output in outputs)
        self._scores.add(index, outputs)
        delta: ChatDelta = {"content": text} if text else {}
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
            self._prompt_logprobs = self._prompt_logprobs or prompt_logprobs_of(outputs, self.body, self._texts)
            first = self._before + delta.get("content", "")
            if first or "tool_calls" not in delta:  # as in OpenAI's API, even if it is still empty
                delta["content"] = first
            delta["role"] = "assistant"
        logprobs: ChatLogprobs | None = None
        if self.body.logprobs:
            logprobs = {"content": [self._logprob(e) for output in outputs for e in output.logprobs or ()]}
        choice: ChatChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if finish:
            choice["stop_reason"] = outputs[-1].stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = [i for output in outputs for i in output.new_token_ids]
        return [choice]

    async def collect(self) -> dict[str, object]:
        """Waits until all samples have finished; returns the complete response."""
        return self.complete([choice async for index, outputs in self.work for choice in self.chunk(index, outputs)])

    def complete(self, chunks: Sequence[ChatChoice]) -> dict[str, object]:
        """The complete response, from all the choices of `chunk`."""
        choices: list[dict[str, object]] = []
        for position, index in enumerate(self._scores.chosen()):
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
            last = mine[-1]
            choices.append(
                {
                    "index": position,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": last["finish_reason"],
                    "stop_reason": last.get("stop_reason"),
                }
            )
            if self.body.return_token_ids:
                choices[-1]["token_ids"] = [i for chunk in mine for i in chunk.get("token_ids", ())]
        prompt: dict[str, object] = {"prompt_token_ids": list(self.work.prompts[0])} if self.body.return_token_ids else {}
        if self._prompt_logprobs is not None:
            prompt["prompt_logprobs"] = self._prompt_logprobs
        return {**self._head, "object": self.object, "choices": choices, "usage": self.usage(), **prompt}

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
        if self.body.return_token_ids:
            return SseEncoder(self._head, only_first={"prompt_token_ids": list(self.work.prompts[0])})
        return SseEncoder(self._head)

    def _logprob(self, entry: TokenLogprob) -> ChatLogprob:
        def spelled(token_id: int, logprob: float) -> ChatLogprob:
            return {"token": self._texts.text(token_id), "logprob": finite(logprob), "bytes": self._texts.bytes(token_id)}

        # The sampled token comes last if it is not among the most likely.
        top = entry.top | {entry.token_id: entry.logprob} if entry.top else {}
        told = spelled(entry.token_id, reported(entry, self.body))
        if self.body.logprobs_mode == "processed" and entry.log_kept_mass is not None:
            told["log_kept_mass"] = entry.log_kept_mass
        return {**told, "top_logprobs": [spelled(i, value) for i, value in top.items()]}


class SseEncoder:
    """Encodes the server-sent events of one response; their common part is encoded once."""

    def __init__(self, head: Mapping[str, object], *, only_first: Mapping[str, object] | None = None) -> None:
        self._head = ("data: " + json.dumps(head)[:-1]).encode()
        self._only_first = f",{_encode(only_first)[1:-1]}".encode() if only_first else b""

    def choices(self, choices: Sequence[CompletionChoice | ChatChoice], *, usage: TokenUsage | bool) -> bytes:
        """Returns one event with its token counts; `usage=True` writes null, because a final event has the counts."""
        tail = b"}\n\n" if usage is False else b',"usage":null}\n\n'
        if not isinstance(usage, bool):
            tail = b',"usage":' + json.dumps(usage).encode() + b"}\n\n"
        first, self._only_first = self._only_first, b""
        return self._head + first + b',"choices":' + _encode(choices).encode() + tail

    def usage(self, usage: Usage | None, timing: Milliseconds | None = None) -> bytes:
        """Returns the event before the last, with the final token counts and times."""
        fields = {"choices": [], "usage": usage} if timing is None else {"choices": [], "usage": usage, "timing": timing}
        return self._head + b"," + _encode(fields)[1:].encode() + b"\n\n"

    @staticmethod
    def error(body: Mapping[str, object]) -> bytes:
        """Returns the event that reports an error after the response has started."""
        return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
