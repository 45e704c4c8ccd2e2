"""The answer of a chat as a message of content blocks, and the events with which it is streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.answer_forms import ChatChoice
from fastgen_jax.serving.answers import ChatAnswer
from fastgen_jax.serving.messages.request import MessagesRequest
from fastgen_jax.serving.responses.items import new_id
from fastgen_jax.serving.sse import typed_event
from fastgen_jax.serving.work import Work

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
_TYPES |= {408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error"}


class MessageAnswer:
    """Builds the response to POST /v1/messages. Only one block is open at a time: the last one."""

    def __init__(self, body: MessagesRequest, work: Work, chat: ChatAnswer) -> None:
        self._work, self._chat = work, chat
        self._finish: str | None = None
        self._stopped_by: str | int | None = None
        self._blocks: list[JsonObject] = []
        self._is_open = False
        self._arguments = ""  # of the block that is open
        self._head: JsonObject = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": body.model}

    async def collect(self) -> JsonFields:
        """Waits for the end of the answer; returns the complete message."""
        async for index, outputs in self._work:
            self._add(self._chat.chunk(index, outputs)[0])
        self._close()
        return {**self._head, "content": self._blocks, **self._stop(), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        started = False
        async for index, outputs in self._work:
            events = []
            if not started:
                started = True
                usage = {**self._usage(), "output_tokens": 0}
                head = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                events.append(typed_event("message_start", {"message": head}))
            events += self._add(self._chat.chunk(index, outputs)[0])
            if events:
                yield b"".join(events)
        end = typed_event("message_delta", {"delta": self._stop(), "usage": self._usage()})
        yield b"".join([*self._close(), end, typed_event("message_stop", {})])

    @staticmethod
    def error(body: Mapping[str, Any]) -> bytes:
        """The event of an error after the stream has started."""
        return typed_event("error", {"error": {"type": "api_error", "message": body["error"]["message"]}})

    def _add(self, choice: ChatChoice) -> list[bytes]:
        delta, events = choice["delta"], []
        self._finish = choice["finish_reason"]
        self._stopped_by = choice.get("stop_reason")
        if text := delta.get("reasoning"):
            events += self._text("thinking", text)
        if text := delta.get("content"):
            events += self._text("text", text)
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                block = {"type": "tool_use", "id": call["id"], "name": function.get("name"), "input": {}}
                events += self._begin(block)
            if function["arguments"]:
                self._arguments += function["arguments"]
                events.append(self._delta({"type": "input_json_delta", "partial_json": function["arguments"]}))
        return events

    def _text(self, kind: str, text: str) -> list[bytes]:
        events = []
        if not self._is_open or self._blocks[-1]["type"] != kind:
            events = self._begin({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        self._blocks[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin(self, block: JsonObject) -> list[bytes]:
        events = self._close()
        self._blocks.append(block)
        self._is_open, self._arguments = True, ""
        start = {"index": len(self._blocks) - 1, "content_block": block}
        return [*events, typed_event("content_block_start", start)]

    def _delta(self, delta: JsonFields) -> bytes:
        return typed_event("content_block_delta", {"index": len(self._blocks) - 1, "delta": delta})

    def _close(self) -> list[bytes]:
        if not self._is_open:
            return []
        self._is_open = False
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _input(self._arguments)
        return [typed_event("content_block_stop", {"index": len(self._blocks) - 1})]

    def _stop(self) -> JsonFields:
        if isinstance(self._stopped_by, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": self._stopped_by}
        return {"stop_reason": _REASONS.get(self._finish or "", "end_turn"), "stop_sequence": None}

    def _usage(self) -> JsonFields:
        usage = self._chat.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }


def error_body(status: int, body: Mapping[str, Any]) -> JsonFields:
    """An error in Anthropic's format."""
    return {"type": "error", "error": {"type": _TYPES.get(status, "api_error"), "message": body["error"]["message"]}}


def _input(arguments: str) -> JsonFields:
    """Arguments as an object; those that the model did not write as one, for example because they were cut off, as text."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    return value if isinstance(value, dict) else {"arguments": value}
