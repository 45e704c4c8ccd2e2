"""Checks of user input whose messages name the argument, its value, the allowed range and a remedy."""

from __future__ import annotations

import math
import struct
from typing import Any

_MAX_TOKEN_ID = 2**31 - 1  # token ids are transferred as int32


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """The elements of `values`; ValueError if it is not iterable."""
    try:
        return tuple(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}; it must be a sequence; use () for none") from None


def check_token_ids(name: str, token_ids: tuple[Any, ...]) -> None:
    """ValueError if an element is not an int in the range of token ids."""
    if _are_token_ids(token_ids):
        return
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id <= _MAX_TOKEN_ID:
            raise ValueError(
                f"{name} contains {token_id!r}; token ids are ints in [0, {_MAX_TOKEN_ID}]; "
                "convert them with int(), and check the tokenizer"
            )


def _are_token_ids(values: tuple[Any, ...]) -> bool:
    """Avoids a Python loop: prompts have thousands of tokens."""
    if list(map(type, values)).count(int) != len(values):
        return False
    try:  # a value that fits into both int32 and uint32 is in [0, _MAX_TOKEN_ID]
        struct.pack(f"{len(values)}i", *values)
        struct.pack(f"{len(values)}I", *values)
    except struct.error:
        return False
    return True


def check_int(name: str, value: object, low: int | None, high: int | None, remedy: str) -> None:
    """ValueError if `value` is not an int in [low, high]; None means no bound."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be an int; {remedy}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; it must be {_range_text(low, high)}; {remedy}")


def check_float(
    name: str, value: object, low: float | None, high: float | None, remedy: str, *, open_low: bool = False
) -> None:
    """ValueError if `value` is not a finite number in [low, high], or (low, high] with `open_low`; None means no bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number; {remedy}")
    too_low = low is not None and (value <= low if open_low else value < low)
    if too_low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; it must be {_range_text(low, high, open_low=open_low)}; {remedy}")


def _range_text(low: float | None, high: float | None, *, open_low: bool = False) -> str:
    if high is None:
        return f"at least {low}"
    return f"in {'(' if open_low else '['}{low}, {high}]"
