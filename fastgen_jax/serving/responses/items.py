"""Items of a conversation: messages, reasoning, calls of functions and their results; as messages of a chat."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.fields import short

ROLES = ("user", "assistant", "system", "developer")


def new_id(kind: str) -> str:
    """A new id, which starts with the abbreviation of its kind."""
    return f"{kind}_{uuid.uuid4().hex}"


def input_items(given: str | Sequence[JsonObject]) -> list[JsonObject]:
    """The items of an input; a string is a message of the user. Each gets an id if it has none."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}] if given else []
    items = []
    for item in given:
        kind = item.get("type") or ("message" if "role" in item else None)
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}.get(str(kind), "item")
        items.append({"type": kind, **item, "id": item.get("id") or new_id(prefix)})
    return items


def listed(item: JsonObject) -> JsonObject:
    """An item of an input in the form in which it is listed: the content of a message as parts."""
    if item["type"] != "message" or not isinstance(item.get("content"), str):
        return item
    is_answer = item.get("role") == "assistant"
    part = {"type": "output_text", "annotations": []} if is_answer else {"type": "input_text"}
    return {"status": "completed", **item, "content": [{**part, "text": item["content"]}]}


def messages_of(items: Sequence[JsonObject]) -> list[JsonObject]:
    """The messages of a chat; calls, and the reasoning before them, become part of an assistant's message."""
    messages: list[JsonObject] = []
    thought = ""  # of the assistant's next message
    for i, item in enumerate(items):
        where = f"input[{i}]"
        match item.get("type"):
            case "message":
                message = _message(item, where)
                if thought and message["role"] == "assistant":
                    message["reasoning_content"], thought = thought, ""
                messages.append(message)
            case "function_call":
                call = {
                    "id": item.get("call_id") or item["id"],
                    "type": "function",
                    "function": {"name": item.get("name"), "arguments": item.get("arguments")},
                }
                if thought or not messages or messages[-1]["role"] != "assistant":
                    messages.append(
                        {"role": "assistant", "content": None, **({"reasoning_content": thought} if thought else {})}
                    )
                    thought = ""
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _parts(item.get("output"))})
            case "reasoning":
                thought = _thought(item)
            case "compaction":
                messages = _compacted(messages, item, where)
            case kind:
                raise ApiError(
                    f"{where} has type {short(kind)}; it must be message, function_call, function_call_output, reasoning or "
                    "compaction",
                    param="input",
                )
    return messages


def _message(item: JsonFields, where: str) -> JsonObject:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise ApiError(f"{where}.role is {short(role)}; choose among {', '.join(ROLES)}", param="input")
    return {"role": role, "content": _parts(content)}


def _compacted(messages: Sequence[JsonObject], item: JsonFields, where: str) -> list[JsonObject]:
    """What stands for the messages before a summary: what the user said, as one message, and the summary.

    Two messages, because many templates require that user and assistant take turns.
    """
    summary = item.get("encrypted_content")
    if not isinstance(summary, str):
        raise ApiError(f"{where}.encrypted_content is {short(summary)}; send the item as it was returned", param="input")
    said: list[object] = []
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            said += content if isinstance(content, list) else [{"type": "text", "text": content}]
    start = [message for message in messages if message["role"] in ("system", "developer")]
    return [
        *start,
        {"role": "user", "content": said or "What happened so far?"},
        {"role": "assistant", "content": f"Summary of the conversation so far: {summary}"},
    ]


def _parts(content: object) -> object:
    """A content without the fields of its parts that mean nothing to a model."""
    if not isinstance(content, list):
        return content
    return [
        {name: value for name, value in part.items() if name in ("type", "text", "refusal")}
        if isinstance(part, dict) and part.get("type") in ("input_text", "output_text", "refusal", "text")
        else part
        for part in content
    ]


def _thought(item: JsonFields) -> str:
    parts = [*(item.get("content") or ()), *(() if item.get("content") else item.get("summary") or ())]
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
