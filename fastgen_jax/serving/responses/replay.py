"""The events of a response that is already complete."""

from __future__ import annotations

from collections.abc import Iterator

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.sse import typed_event


def replayed(response: JsonFields) -> list[bytes]:
    """The events with which `response` could have been streamed: each text and each call in one piece."""
    return [typed_event(kind, {"sequence_number": i, **fields}) for i, (kind, fields) in enumerate(_events(response))]


def _events(response: JsonFields) -> Iterator[tuple[str, JsonObject]]:
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for index, item in enumerate(response["output"]):
        where = {"item_id": item["id"], "output_index": index}
        empty = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
        status = {"status": "in_progress"} if "status" in item else {}
        yield "response.output_item.added", {"output_index": index, "item": {**item, **empty, **status}}
        if item["type"] == "function_call":
            yield "response.function_call_arguments.delta", {**where, "delta": item["arguments"]}
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield "response.function_call_arguments.done", {**where, **done}
        for number, part in enumerate(item.get("content", ())):
            at = {**where, "content_index": number}
            logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            nothing = {**part, "text": "", **({"logprobs": []} if logprobs else {})}
            yield "response.content_part.added", {**at, "part": nothing}
            yield f"response.{part['type']}.delta", {**at, "delta": part["text"], **logprobs}
            yield f"response.{part['type']}.done", {**at, "text": part["text"], **logprobs}
            yield "response.content_part.done", {**at, "part": part}
        yield "response.output_item.done", {"output_index": index, "item": item}
    yield f"response.{'completed' if response['status'] == 'completed' else 'incomplete'}", {"response": response}
