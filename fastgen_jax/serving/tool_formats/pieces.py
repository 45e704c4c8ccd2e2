"""Reading an answer while it arrives: the parts of its text, and parsers that wait for more of it.

A parser is a generator over a `Source`. It yields a `Piece` as soon as it is certain of it, and None when it needs more
text; at the end of the text it must not wait. `Reader` runs one. The pieces of one kind join to the same text however the
answer was split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from fastgen_jax.json_types import JsonFields

T = TypeVar("T")
Kind = Literal["content", "reasoning", "call", "arguments"]
Schemas = Mapping[str, JsonFields]  # the parameters of each tool, a JSON schema, by name


class Piece(NamedTuple):
    """A part of an answer: text for the user, reasoning, the name of a function called, or more of its arguments."""

    kind: Kind
    text: str


class Source:
    """The text that has arrived and was not read yet."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def take(self, size: int) -> str:
        """Removes and returns the next `size` characters."""
        taken, self.text = self.text[:size], self.text[size:]
        return taken


Steps = Generator[Piece | None, None, T]
Parser = Callable[[Source, Schemas], Steps[None]]


class Reader:
    """Splits the text of one answer into pieces.

    White space is dropped between calls, and around reasoning. Without `several`, only the first call is returned.
    With `only_calls`, text for the user is dropped: a grammar allows none, so it is the start of a call that was cut off.
    """

    def __init__(self, parser: Parser, schemas: Schemas, *, several: bool = True, only_calls: bool = False) -> None:
        self.num_calls = 0
        self._source = Source()
        self._steps = parser(self._source, schemas)
        self._several = several
        self._only_calls = only_calls
        self._last: Kind | None = None  # of the last piece that was not white space
        self._space = ""  # held back
        self._skips = False  # the call is not returned

    @property
    def is_reasoning(self) -> bool:
        """Whether the latest piece was reasoning."""
        return self._last == "reasoning"

    def push(self, text: str) -> list[Piece]:
        """The pieces of which `text` makes the parser certain."""
        self._source.text += text
        return self._run()

    def flush(self) -> list[Piece]:
        """The rest, after the end of the text; a length limit may have cut off a call."""
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in self._steps:
            if piece is None:
                break
            if piece.kind in ("call", "arguments"):
                self._note_call(piece)
                if not self._skips:
                    pieces.append(piece)
            elif self._only_calls and piece.kind == "content":
                continue
            elif text := self._trimmed(piece):
                pieces.append(Piece(piece.kind, text))
        return pieces

    def _note_call(self, piece: Piece) -> None:
        self._last, self._space = "call", ""
        if piece.kind == "call":
            self._skips = bool(self.num_calls) and not self._several
            self.num_calls += not self._skips

    def _trimmed(self, piece: Piece) -> str:
        """The text of a piece with the space held back before it, without space at its end that may have to be dropped."""
        kind, text = piece
        if kind != self._last and (kind == "reasoning" or self._last == "reasoning"):
            self._space = ""
            text = text.lstrip()
        if not text:
            return ""
        text = self._space + text
        kept = text.rstrip() if kind == "reasoning" or self._last == "call" else text
        if kind == "content" and kept:
            kept = text
        self._space = text[len(kept) :]
        if kept:
            self._last = kind
        return kept


def held_back(text: str, marks: Sequence[str]) -> int:
    """The length of the end of `text` that may be the start of one of `marks`."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    return next((k for k in range(longest, 0, -1) if any(mark.startswith(text[-k:]) for mark in marks)), 0)


def first_mark(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """Where the first of `marks` is in `text`, and which; the longest one of several at the same place."""
    found = [(position, -len(mark), mark) for mark in marks if (position := text.find(mark, start)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def until(source: Source, marks: Sequence[str], kind: Kind, form: Callable[[str], str] = str) -> Steps[str | None]:
    """Yields the text before the first of `marks`, as `form` changes it; returns the mark, None at the end of the text."""
    while True:
        found = first_mark(source.text, marks)
        if found is not None and (source.ended or not _may_be_longer(source.text, found, marks)):
            if found[0]:
                yield Piece(kind, form(source.take(found[0])))
            return source.take(len(found[1]))
        size = len(source.text) - (0 if source.ended else held_back(source.text, marks))
        size = size if found is None else min(size, found[0])
        if size:
            yield Piece(kind, form(source.take(size)))
        if source.ended:
            return None
        yield None


def gather(source: Source, marks: Sequence[str]) -> Steps[tuple[str, str | None]]:
    """Waits for the first of `marks`; returns the text before it and the mark, None at the end of the text."""
    start, longest = 0, max(map(len, marks))
    while True:
        found = first_mark(source.text, marks, start)
        if found is not None and (source.ended or not _may_be_longer(source.text, found, marks)):
            return source.take(found[0]), source.take(len(found[1]))
        if source.ended:
            return source.take(len(source.text)), None
        start = max(0, len(source.text) - longest)
        yield None


def _may_be_longer(text: str, found: tuple[int, str], marks: Sequence[str]) -> bool:
    """Whether more text could turn the mark that was found into a longer one."""
    rest = text[found[0] :]
    return any(len(mark) > len(rest) and mark.startswith(rest) for mark in marks)


def spaces(source: Source) -> Steps[None]:
    """Removes white space; waits for what follows it."""
    while True:
        source.text = source.text.lstrip()
        if source.text or source.ended:
            return
        yield None


def skip(source: Source, mark: str) -> Steps[None]:
    """Removes `mark` if it comes next, or its beginning if the text ends within it."""
    while mark.startswith(source.text) and source.text != mark:
        if source.ended:
            source.text = ""
            return
        yield None
    source.text = source.text.removeprefix(mark)


def json_value(source: Source, marks: Sequence[str]) -> Steps[None]:
    """Yields one JSON value as arguments, as it arrives; it ends at the latest before the first of `marks`.

    A string is decoded: some models write their arguments as JSON in a string.
    """
    yield from spaces(source)
    opened = source.text[:1]
    if opened not in ("{", "["):
        yield from _scalar(source, marks)
        return
    depth, inside, escaped = 0, False, False
    while True:
        found = first_mark(source.text, marks)
        limit = found[0] if found else len(source.text) - (0 if source.ended else held_back(source.text, marks))
        for i in range(limit):
            character = source.text[i]
            if inside:
                if escaped:
                    escaped = False
                elif character == "\\":
                    escaped = True
                elif character == '"':
                    inside = False
            elif character == '"':
                inside = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
                if depth == 0:
                    yield Piece("arguments", source.take(i + 1))
                    return
        if limit:
            yield Piece("arguments", source.take(limit))
        if found or source.ended:
            return
        yield None


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"[^\s,}\]]+(?=[\s,}\]])")


def _scalar(source: Source, marks: Sequence[str]) -> Steps[None]:
    while True:
        match = (_STRING if source.text.startswith('"') else _SCALAR).match(source.text)
        if match is not None:
            break
        if source.ended or first_mark(source.text, marks):
            return
        yield None
    text = source.take(match.end())
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    yield Piece("arguments", "{}" if value is None else value if isinstance(value, str) else text)


_HEAD = re.compile(
    r'\s*\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"]*)"')
_KEYS = ("name", "arguments", "parameters", "type", "id", "function")


def json_call(source: Source, marks: Sequence[str]) -> Steps[bool]:
    """Reads `{"name": ..., "arguments": ...}`, before the first of `marks`, and yields it as a call.

    Returns False, with the text still unread, if it is something else.
    """
    while True:
        found = first_mark(source.text, marks) if marks else None
        match = _HEAD.match(source.text, 0, found[0] if found else len(source.text))
        if match is not None:
            source.take(match.end())
            yield Piece("call", json.loads(match[1], strict=False))
            yield from json_value(source, marks)
            yield from _end_of_object(source, marks)
            return True
        key = _FIRST_KEY.match(source.text)
        start = source.text.lstrip()[:1]
        if start not in ("", "{") or (key is not None and key[1] not in _KEYS):
            return False
        if found or source.ended:
            break
        yield None
    text = source.text[: found[0]] if found else source.text
    try:  # the keys may have another order, and arguments may be missing
        call, size = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str):
        return False
    source.take(len(text) - len(text.lstrip()) + size)
    yield Piece("call", name)
    yield Piece("arguments", arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
    return True


def _end_of_object(source: Source, marks: Sequence[str]) -> Steps[None]:
    """Removes the rest of an object whose last value was read: usually only its brace."""
    depth = 1
    while True:
        found = first_mark(source.text, marks) if marks else None
        limit = found[0] if found else len(source.text) - (0 if source.ended or not marks else held_back(source.text, marks))
        for i in range(limit):
            depth += {"{": 1, "}": -1}.get(source.text[i], 0)
            if depth == 0:
                source.take(i + 1)
                return
        source.take(limit)
        if found or source.ended:
            return
        yield None


def escaped(text: str) -> str:
    """Text as it is written inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def typed(text: str, schema: JsonFields) -> str:
    """The JSON of a value that was written as plain text: a string, or what `schema` allows instead."""
    allowed = types_of(schema)
    if allowed == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    plain = text.strip()
    words = {"True": "true", "False": "false", "None": "null"}
    plain = words.get(plain, plain) if not allowed or allowed & {"boolean", "null"} else plain
    try:
        value = json.loads(plain)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if allowed and _type_of(value) not in allowed and "string" in allowed:
        return json.dumps(text, ensure_ascii=False)
    return plain


def types_of(schema: JsonFields) -> set[str]:
    """The types that a schema allows; empty if it does not say."""
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind, "integer"} if kind == "number" else {kind}
    if isinstance(kind, list):
        return {str(name) for name in kind}
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        each = [types_of(option) if isinstance(option, dict) else set() for option in options]
        return set().union(*each) if all(each) else set()
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    return {_type_of(value) for value in values} if isinstance(values, list) else set()


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
