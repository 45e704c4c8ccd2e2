"""Types and checks that the bodies of all endpoints share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_CHOICES = 128  # samples of one prompt
MAX_STOPS = 1024
MAX_STOP_CHARACTERS = 16_000  # of all stop strings together: the matcher needs about half a kilobyte for each
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]  # strict: neither true nor "7" is a token
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


def short(value: object) -> str:
    """Returns a value as error messages show it: at most 100 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with too many digits, or a list nested too deeply
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


class Body(BaseModel):
    """Base of the bodies; refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


def check_neutral(body: Body, neutral: Mapping[str, tuple[object, ...]]) -> None:
    """ValueError if a field that this server cannot fulfil has none of the values that ask for nothing."""
    for name, values in neutral.items():
        if (value := getattr(body, name)) not in values:
            raise ValueError(f"{name}={short(value)} is not supported here; remove it")


class ChatOptions(Body):
    """Mixin: the fields that other APIs have in common with a chat, which checks their values."""

    PASSED_ON: ClassVar = ("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "priority", "timeout")

    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="An extension to the Responses API.")
    min_p: float | None = Field(None, description="Extension.")
    seed: int | None = Field(None, description="Extension.")
    priority: int | None = Field(None, description="Extension.")
    timeout: float | None = Field(None, description="Extension.")
