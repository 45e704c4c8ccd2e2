"""Dataclass fields that convert the value they are given, also in frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Converted:
    """A data descriptor: the generated `__init__` sets it, and it stores what `convert` returns."""

    def __init__(self, convert: Callable[[Any], Any], default: object) -> None:
        self._convert = convert
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        return self._default if instance is None else vars(instance)[self._name]

    def __set__(self, instance: object, value: object) -> None:
        vars(instance)[self._name] = self._convert(value)


def converted(convert: Callable[[Any], Any], *, default: object) -> Any:
    """A field of a dataclass without slots that stores `convert(value)`; `default` must be what `convert` returns for it.

    Annotate the field with what the constructor accepts.
    """
    return _Converted(convert, default)
