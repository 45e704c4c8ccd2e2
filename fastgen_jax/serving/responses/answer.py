"""The answer of a chat as a response: its items, and the events with which they are streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.answer_forms import ChatChoice
from fastgen_jax.serving.answers import ChatAnswer
from fastgen_jax.serving.responses.items import new_id
from fastgen_jax.serving.responses.request import ResponsesRequest
from fastgen_jax.serving.sse import typed_event
from fastgen_jax.serving.work import Work

Event = tuple[str, JsonObject]  # its type, and its other fields


class ResponseAnswer:
    """Builds the response to POST /v1/responses. Only one item is open at a time: the last one of the output."""

    def __init__(self, body: ResponsesRequest, work: Work, chat: ChatAnswer, *, model: str) -> None:
        self._work, self._chat = work, chat
        self._wants_logprobs = body.wants_logprobs
        form = body.text.format if body.text else None
        params = work.params[0]
        self._finish: str | None = None
        self._open: JsonObject | None = None
        self._sequence = 0
        self.response: JsonObject = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": bool(body.background),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "temperature": 1.0 if params.temperature is None else params.temperature,
            "text": {"format": form.model_dump(by_alias=True) if form else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"description": None, "strict": None, **tool} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if params.top_p is None else params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    async def collect(self) -> JsonObject:
        """Waits for the end of the answer; returns the complete response."""
        async for index, outputs in self._work:
            self._add(self._chat.chunk(index, outputs)[0])
        self._end()
        return self.response

    async def events(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        started = False
        async for index, outputs in self._work:
            if not started:
                started = True
                for kind in ("response.created", "response.in_progress"):
                    yield self._encode((kind, {"response": self.response}))
            if events := self._add(self._chat.chunk(index, outputs)[0]):
                yield b"".join(map(self._encode, events))
        events = self._end()
        yield b"".join(map(self._encode, events))

    def error(self, body: Mapping[str, Any]) -> bytes:
        """The event of an error after the stream has started."""
        fields = body["error"]
        event = {"code": fields["code"] or fields["type"], "message": fields["message"], "param": fields["param"]}
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": fields["message"]}}
        return self._encode(("error", event)) + self._encode(("response.failed", {"response": self.response}))

    def _encode(self, event: Event) -> bytes:
        kind, fields = event
        data = typed_event(kind, {"sequence_number": self._sequence, **fields})
        self._sequence += 1
        return data

    def _add(self, choice: ChatChoice) -> list[Event]:
        delta, events = choice["delta"], []
        self._finish = choice["finish_reason"]
        if text := delta.get("reasoning"):
            events += self._text("reasoning", text, None)
        logprobs = choice["logprobs"]["content"] if self._wants_logprobs and choice["logprobs"] else None
        if text := delta.get("content"):
            events += self._text("message", text, logprobs)
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                item = {"id": new_id("fc"), "type": "function_call", "call_id": call["id"], "name": function.get("name")}
                events += self._begin({**item, "arguments": "", "status": "in_progress"})
            if self._open is not None and function["arguments"]:
                self._open["arguments"] += function["arguments"]
                events.append(self._event("response.function_call_arguments.delta", delta=function["arguments"]))
        return events

    def _text(self, kind: str, text: str, logprobs: list[Any] | None) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events += self._begin(
                {"id": new_id("msg"), "type": kind, "role": "assistant", "content": [], "status": "in_progress"}
                if kind == "message"
                else {"id": new_id("rs"), "type": kind, "summary": [], "content": []}
            )
            part: JsonObject = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            part = part if kind == "message" else {"type": "reasoning_text", "text": ""}
            events.append(self._event("response.content_part.added", content_index=0, part=part))
            self._item["content"].append({**part})
        part = self._item["content"][0]
        part["text"] += text
        more: JsonObject = {}
        if kind == "message":
            part["logprobs"] = [*part["logprobs"], *(logprobs or ())]
            more["logprobs"] = logprobs or []
        name = "output_text" if kind == "message" else "reasoning_text"
        return [*events, self._event(f"response.{name}.delta", content_index=0, delta=text, **more)]

    @property
    def _item(self) -> JsonObject:
        assert self._open is not None
        return self._open

    def _begin(self, item: JsonObject) -> list[Event]:
        events = self._close("completed")
        self.response["output"].append(item)
        self._open = item
        return [*events, ("response.output_item.added", {"output_index": self._index, "item": _copied(item)})]

    def _close(self, status: str) -> list[Event]:
        item, events = self._open, []
        if item is None:
            return []
        if item["type"] != "reasoning":
            item["status"] = status
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("response.function_call_arguments.done", **done))
        elif item["content"]:
            part = item["content"][0]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            events.append(self._event(f"response.{name}.done", content_index=0, text=part["text"], **more))
            events.append(self._event("response.content_part.done", content_index=0, part=part))
        events.append(("response.output_item.done", {"output_index": self._index, "item": item}))
        self._open = None
        return events

    def _end(self) -> list[Event]:
        cut, cancelled = self._finish == "length", not self._work.is_complete
        events = [] if self.response["output"] or cancelled else self._text("message", "", None)[:-1]
        whole = not (cut or cancelled)
        events += self._close("completed" if whole else "incomplete")
        self.response["status"] = "cancelled" if cancelled else "incomplete" if cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.response["completed_at"] = int(time.time()) if whole else None
        self.response["usage"] = usage_of(self._chat)
        return [*events, (f"response.{'completed' if whole else 'incomplete'}", {"response": self.response})]

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _event(self, kind: str, **fields: object) -> Event:
        return kind, {"item_id": self._item["id"], "output_index": self._index, **fields}


def usage_of(chat: ChatAnswer) -> JsonFields:
    """The token counts of a chat in the form of this API."""
    usage = chat.usage()
    details = usage.get("completion_tokens_details")
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details["reasoning_tokens"] if details else 0},
        "total_tokens": usage["total_tokens"],
    }


def _copied(item: JsonObject) -> JsonObject:
    return {**item, "content": [*item["content"]]} if "content" in item else {**item}
