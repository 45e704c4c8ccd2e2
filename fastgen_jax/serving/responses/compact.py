"""POST /v1/responses/compact: the model summarizes a conversation, so that it goes on with fewer tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.answers import ChatAnswer
from fastgen_jax.serving.fields import Body
from fastgen_jax.serving.protocol import ChatRequest
from fastgen_jax.serving.responses.answer import usage_of
from fastgen_jax.serving.responses.items import new_id
from fastgen_jax.serving.responses.request import ResponsesRequest, chat_of

MAX_SUMMARY_TOKENS = 2048
_TASK = (
    "Summarize our conversation so far for somebody who continues it: what was asked, what was found out and decided, the "
    "results of tools, and what is still to be done. Write only the summary."
)


class CompactRequest(Body):
    """The body. Fields described as extensions are not in OpenAI's API."""

    model: str | None = Field(None, description="None: the served model.")
    input: str | list[JsonObject] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    image: JsonObject | None = Field(None, description="Means nothing here, like the fields after it.")
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    service_tier: Literal["auto", "default", "fast", "flex", "priority"] | None = None
    max_output_tokens: int | None = Field(None, ge=1, description="Extension: maximum number of tokens of the summary.")


def summary_of(body: CompactRequest, items: Sequence[JsonObject], *, model: str) -> ChatRequest:
    """The chat that asks for a summary of the conversation `items`."""
    request = ResponsesRequest(
        instructions=body.instructions, max_output_tokens=body.max_output_tokens or MAX_SUMMARY_TOKENS, temperature=0
    )
    return chat_of(request, [*items, {"type": "message", "role": "user", "content": _TASK}], model=model)


def compacted(items: Sequence[JsonFields], summary: dict[str, Any], chat: ChatAnswer) -> JsonObject:
    """The response: the messages of the user, and an item with the summary that stands for all others."""
    said = [item for item in items if item.get("type") == "message" and item.get("role") == "user"]
    text = summary["choices"][0]["message"]["content"] or ""
    return {
        "id": new_id("resp"),
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*said, {"id": new_id("cmp"), "type": "compaction", "encrypted_content": text}],
        "usage": usage_of(chat),
    }
