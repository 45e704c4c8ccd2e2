"""Options that come as text, NAME=VALUE, from a command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
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


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" with the known name that is spelt most like `name`, or nothing if none is."""
    spelling = name.lower().replace("-", "_")
    found = difflib.get_close_matches(spelling, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown_option(name: str, known: Iterable[str], others: Mapping[str, str], *, kind: str) -> ValueError:
    """The error for an option that is not among the `known` of a `kind`.

    `others` has what other programs call things, by name: one of the known, or a sentence for what has no equal here.
    """
    known = sorted(known)
    other = others.get(name.lower().replace("-", "_"))
    if other is None:
        hint = nearest(name, known)
    else:
        hint = f"; use {other!r}" if other in known else f"; {other}"
    return ValueError(f"unknown option {name!r}{hint}{'' if hint.endswith('?') else ';'} {kind} options: {', '.join(known)}")
