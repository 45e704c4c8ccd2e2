"""Errors in the shape that OpenAI's clients expect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from fastgen_jax.api.async_engine import ClosedError, QueueFullError, RequestFailedError
from fastgen_jax.scheduling import ContextLengthError, SamplingParams
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest, short

_FIELDS = {*CompletionRequest.model_fields, *ChatRequest.model_fields, *SamplingParams.__dataclass_fields__}
NO_RETRY = {"x-should-retry": "false"}  # what OpenAI's clients look at before they send a request again


class ApiError(Exception):
    """An answer other than 200: HTTP status, OpenAI's type and code, the offending parameter."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def unsupported(param: str, value: Any, remedy: str) -> ApiError:
    """The refusal of something that OpenAI's interface has and this server has not."""
    return ApiError(f"{param}={short(value)} is not supported here; {remedy}", param=param, code="unsupported_parameter")


def context_exceeded(error: ContextLengthError, param: str) -> ApiError:
    """The refusal of a prompt in field `param`, in the words and with the code that OpenAI's clients look for."""
    prompt, requested = error.num_prompt, error.num_requested
    said = (
        f"you requested {prompt + requested} tokens ({prompt} in the {param}, {requested} in the completion)"
        if requested
        else f"your {param} resulted in {prompt} tokens"
    )
    return ApiError(
        f"This model's maximum context length is {error.limit} tokens. However, {said}: {error}",
        param=param,
        code="context_length_exceeded",
    )


def from_validation_errors(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The answer to a body that pydantic has refused: field, value, what is wanted."""
    # Of a field that may have several forms, pydantic tells what is wrong with each; the form that was meant is the one
    # whose type is right, or where the error lies deepest.
    worst = max(errors, key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    where = [str(part) for part in worst["loc"] if part != "body"]
    field = where[0] if where else None
    message = worst["msg"].removeprefix("Value error, ")
    if worst["type"] == "extra_forbidden":
        message = f"unknown field {'.'.join(where)!r}; leave it out"
    elif worst["type"] == "json_invalid":
        message, field = f"the body is not JSON: {worst['ctx']['error']}", None
    elif field is not None and worst["type"] == "missing":
        message = f"{'.'.join(where)} is missing; it is required"
    elif field is not None and worst["type"] != "value_error":
        # Names of forms, such as list[constrained-str], are pydantic's own.
        named = [part for part in where if (part.isidentifier() and part not in ("str", "int")) or part.isdigit()]
        message = f"{'.'.join(named)} is {short(worst['input'])}: {message[:1].lower()}{message[1:]}"
    elif field is not None:
        message = f"{field}: {message}"
    return ApiError(message, param=field or _named(message))


def _named(message: str) -> str | None:
    """The argument that an error is about; those of the engine and of the protocol begin with its name."""
    name = re.match(r"\w*", message)
    return name[0] if name and name[0] in _FIELDS else None


def as_api_error(error: Exception) -> ApiError:
    """The answer to whatever went wrong with a request; anything unforeseen is a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(
            str(error),
            status=429,
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(error.retry_after)},
        )
    if isinstance(error, ClosedError):
        return ApiError(str(error), status=503, type="server_error", code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, RequestFailedError):
        if error.failure.kind == "deadline":
            return ApiError(str(error), status=408, type="timeout", code="deadline_exceeded", headers=NO_RETRY)
        if error.failure.kind == "grammar":
            return ApiError(str(error), code="grammar_failed", headers=NO_RETRY)
        status = {"shutdown": 503, "refused": 429}.get(error.failure.kind, 500)
        # A request that was refused is as welcome in a moment as any other.
        again = error.failure.retry_after or (1 if status in (429, 503) else None)
        return ApiError(
            str(error),
            status=status,
            type="server_error",
            code=error.failure.kind,
            headers={"Retry-After": str(again)} if again else {},
        )
    if isinstance(error, ContextLengthError):
        return context_exceeded(error, "prompt")
    if isinstance(error, RecursionError):
        return ApiError("the body is nested too deeply; make it flatter")
    if isinstance(error, ValueError):
        return ApiError(str(error), param=_named(str(error)))
    return ApiError(f"the server failed: {type(error).__name__}", status=500, type="server_error", code="internal")
