"""Errors in the format that OpenAI's clients expect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from fastgen_jax.api.async_engine import ClosedError, QueueFullError, RequestFailedError
from fastgen_jax.json_types import JsonFields
from fastgen_jax.scheduling import ContextLengthError, SamplingParams
from fastgen_jax.serving.fields import short
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest

_FIELDS = {*CompletionRequest.model_fields, *ChatRequest.model_fields, *SamplingParams.__dataclass_fields__}
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients check it before they retry


# Any, as in FastAPI's own annotation for the descriptions of responses.
ErrorResponses = dict[int | str, dict[str, Any]]


class ApiError(Exception):
    """An error response: HTTP status, OpenAI's type and code, and the parameter at fault."""

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
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Returns the HTTP response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def unsupported(param: str, value: object, remedy: str) -> ApiError:
    """Returns the error for a feature of OpenAI's API that this server does not have."""
    return ApiError(f"{param}={short(value)} is not supported here; {remedy}", param=param, code="unsupported_parameter")


def context_exceeded(error: ContextLengthError, param: str) -> ApiError:
    """Returns the error for a prompt in field `param`, with the words and the code that OpenAI's clients look for."""
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


def from_validation_errors(errors: Sequence[JsonFields]) -> ApiError:
    """Returns the error for a body that pydantic refused, with the field, its value and what is expected."""
    # For a field with several forms pydantic reports an error of each. The form that the client meant is the one with the
    # right type, or the one whose error is deepest.
    worst = max(errors, key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    where = [str(part) for part in worst["loc"] if part != "body"]
    field = where[0] if where else None
    message = worst["msg"].removeprefix("Value error, ")
    if worst["type"] == "extra_forbidden":
        message = f"unknown field {'.'.join(where)!r}; remove it"
    elif worst["type"] == "json_invalid":
        message, field = f"the body is not JSON: {worst['ctx']['error']}", None
    elif field is not None and worst["type"] == "missing":
        message = f"{'.'.join(where)} is required; add it"
    elif field is not None and worst["type"] != "value_error":
        # Leaves out pydantic's names of forms, such as list[constrained-str].
        named = [part for part in where if (part.isidentifier() and part not in ("str", "int")) or part.isdigit()]
        message = f"{'.'.join(named)} is {short(worst['input'])}: {message[:1].lower()}{message[1:]}"
    elif field is not None:
        message = f"{field}: {message}"
    return ApiError(message, param=field or _named(message))


def _named(message: str) -> str | None:
    """The parameter that an error is about: messages of the engine and of the protocol start with its name."""
    name = re.match(r"(\w+)(=?)", message)
    return name[1] if name and (name[2] or name[1] in _FIELDS) else None


def as_written(message: str, names: Mapping[str, str]) -> str:
    """The message with the client's names of parameters instead of the engine's."""
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), message) if names else message


def as_api_error(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """Returns the response to any exception of a request; an unexpected one becomes a 500.

    `names` are the client's names of parameters that have others in the engine.
    """
    answer = _answer_to(error)
    if names and answer.status < 500:
        fields = answer.body["error"]
        message = as_written(str(answer), names)
        param = names.get(fields["param"], fields["param"]) if fields["param"] else _named(message)
        return ApiError(
            message, status=answer.status, type=fields["type"], param=param, code=fields["code"], headers=answer.headers
        )
    return answer


def _answer_to(error: Exception) -> ApiError:
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
        # The client may retry soon: nothing is wrong with the request.
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
