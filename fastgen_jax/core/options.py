"""Options that come as text, NAME=VALUE, from a command line."""

from __future__ import annotations

import json
from typing import Any


def split_pair(pair: str, flag: str) -> tuple[str, str]:
    """NAME and VALUE of `pair`; ValueError that quotes `flag` if it is not NAME=VALUE."""
    name, separator, value = pair.partition("=")
    if not separator or not name or not value:
        raise ValueError(f"{flag} is {pair!r}; write it as NAME=VALUE")
    return name, value


def parse_option(pair: str, flag: str) -> tuple[str, Any]:
    """NAME and VALUE of `pair`, where a VALUE that is JSON (numbers, true, null, lists) is what it says, else text.

    A list becomes a tuple. ValueError that quotes `flag` if `pair` is not NAME=VALUE.
    """
    name, text = split_pair(pair, flag)
    try:
        value = json.loads(text)
    except ValueError:
        return name, text
    return name, tuple(value) if isinstance(value, list) else value
