"""What a check of `fastgen doctor` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """Something that is wrong on this machine, and what the user can do about it."""

    what: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check."""

    facts: dict[str, Any] = field(default_factory=dict)
    """For --json. `Any`: JSON."""
    lines: Sequence[tuple[str, str]] = ()
    """(label, text) for the terminal."""
    problems: Sequence[Problem] = ()


def size(num_bytes: float) -> str:
    """A number of bytes for readers: GiB with one digit, or MiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
