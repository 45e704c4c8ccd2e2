"""GET /v1/models in Anthropic's format, for its clients."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import Scope

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.messages.endpoints import PATH as MESSAGES_PATH

MODELS_PATH = "/v1/models"
VERSION = "anthropic-version"  # the header that every client of Anthropic's API sends


def is_anthropic(scope: Scope) -> bool:
    """Whether a request expects answers in Anthropic's format: by its path or, where both APIs share one, by its headers."""
    path: str = scope["path"]
    return path.startswith(MESSAGES_PATH) or (path.startswith(MODELS_PATH) and VERSION in Headers(scope=scope))


def model_info(name: str, *, created: float, max_tokens: int | None) -> JsonObject:
    """One model; `max_tokens` is how long its contexts can be, None while that is not known."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(int(created), UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": max_tokens,
        "max_tokens": max_tokens,
        "capabilities": None,
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
    }


def page_of(models: Sequence[JsonObject], *, limit: int, after_id: str | None, before_id: str | None) -> JsonObject:
    """The part of a list that a client asks for: `limit` models after one, before one, or from the start.

    Raises ApiError if there is no such model.
    """
    if after_id is not None and before_id is not None:
        raise ApiError("after_id and before_id are both set; pass only one of them", param="after_id")
    first, last = 0, len(models)
    if after_id is not None:
        first = _index(models, after_id, "after_id") + 1
    if before_id is not None:
        last = _index(models, before_id, "before_id")
        first = max(0, last - limit)
    page = list(models[first : min(last, first + limit)])
    has_more = first > 0 if before_id is not None else first + len(page) < last
    ids = [model["id"] for model in page]
    return {"data": page, "has_more": has_more, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


def _index(models: Sequence[JsonObject], name: str, param: str) -> int:
    ids = [model["id"] for model in models]
    if name not in ids:
        raise ApiError(f"{param} is {name[:100]!r}, which is not among the models: {', '.join(ids)}", param=param)
    return ids.index(name)
