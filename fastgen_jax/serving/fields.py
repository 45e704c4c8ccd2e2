"""Types and checks that the bodies of all endpoints share."""

from __future__ import annotations

from typing import Annotated

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
