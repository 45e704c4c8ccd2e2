"""The input of a batch: its format, JSON lines or plain text, and the request in each of its lines.

The format is decided once, for the whole file. An invalid line has a `fault` and no request; it does not stop the reading of
the others.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

Format = Literal["jsonl", "text"]
FORMATS = ("auto", "jsonl", "text")
URLS = ("/v1/completions", "/v1/chat/completions")
MAX_LINE = 64 * 2**20  # bytes; four times the largest body that a server accepts by default

_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
_CUSTOM_ID = re.compile(r'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')
_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that is not blank."""

    number: int
    """From 0, blank lines counted."""
    value: object = None
    """The parsed JSON, or the line itself in a file of plain text."""
    given_id: str | None = None
    """Its `custom_id`, if that is valid."""
    custom_id: str | float
    """The `custom_id` of its answer: as given, or the line's number."""
    fault: str | None = None
    """Why it is not a request."""

    def request(self, model: str, options: Mapping[str, object]) -> tuple[str, dict[str, object]]:
        """Returns URL and body; `model` and `options` fill what the body omits. ValueError if it is not a request."""
        if self.fault is not None:
            raise ValueError(self.fault)
        value = self.value
        if isinstance(value, str):
            return URLS[0], {"model": model, "prompt": value, **options}
        if not isinstance(value, dict):
            raise ValueError(
                f"the line is {_TYPES[type(value)]}; it must be a string or an object in OpenAI's batch format or "
                "with 'prompt' or 'messages'"
            )
        if "body" in value:
            url, body = value.get("url"), value["body"]
            if url not in URLS:
                raise ValueError(f"url is {_short(url) if 'url' in value else 'missing'}; choose one of {', '.join(URLS)}")
            if value.get("method", "POST") != "POST":
                raise ValueError(f"method is {_short(value['method'])}; it must be 'POST'")
            if not isinstance(body, dict):
                raise ValueError(f"body is {_TYPES[type(body)]}; it must be the request, an object")
            if body.get("stream"):
                raise ValueError("body has stream=true; remove it, because an answer is one line")
        elif "prompt" in value or "messages" in value:
            url = URLS["messages" in value]
            body = {name: item for name, item in value.items() if name != "custom_id"}
        else:
            raise ValueError(
                "an object requires 'body' (OpenAI's batch format), 'prompt' or 'messages'; this one has "
                f"{', '.join(map(_short, list(value)[:5])) or 'nothing'}"
            )
        own = {name: item for name, item in body.items() if name != "model" or item is not None}
        return url, {"model": model, **options, **own}


class BatchInput:
    """A file of requests, read one line at a time. It is read once at the start to collect the ids.

    Memory holds 16 bytes for each line that has an id. Raises ValueError if the file is not lines of UTF-8.
    """

    def __init__(self, path: Path, *, form: str = "auto") -> None:
        if form not in FORMATS:
            raise ValueError(f"format is {form!r}; choose one of {', '.join(FORMATS)}")
        if not path.is_file():
            raise ValueError(f"{path} is not a file; pass a file of requests")
        self.path = path
        self.form: Format = _find_format(path, form)
        self.num_lines = 0
        """Lines that are not blank."""
        self.end = 0
        """One more than the number of the last one."""
        self._numbers, self._ids = array("q"), array("q")
        for line in self:
            self.num_lines, self.end = self.num_lines + 1, line.number + 1
            if line.given_id is not None:
                self._numbers.append(line.number)
                self._ids.append(hash(line.given_id))

    def __iter__(self) -> Iterator[Line]:
        with self.path.open("rb") as file:
            for number, raw in _raw_lines(file):
                yield _read_line(number, raw, self.form)

    @cached_property
    def repeats(self) -> dict[int, int]:
        """Maps each line with a repeated id to the first line with that id."""
        ids, numbers = np.frombuffer(self._ids, np.int64), np.frombuffer(self._numbers, np.int64)
        order = np.argsort(ids, kind="stable")
        is_repeat = np.append(False, ids[order][1:] == ids[order][:-1])[: len(ids)]
        group = np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(ids))))
        firsts = numbers[order[group]]
        return dict(zip(numbers[order[is_repeat]].tolist(), firsts[is_repeat].tolist(), strict=True))

    def could_be(self, number: int, custom_id: object) -> bool:
        """Whether the input may have a line of that number with that id."""
        place = bisect_left(self._numbers, number)
        if place < len(self._numbers) and self._numbers[place] == number:
            return hash(custom_id) == self._ids[place] if isinstance(custom_id, str) else False
        return number < self.end


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without byte order mark and line end; a longer line is cut after MAX_LINE + 1."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        rest = raw
        while len(rest) == MAX_LINE + 1 and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        # Also inside a file: concatenating files leaves one there.
        line = raw.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        if line.strip():
            yield number, line
        number += 1


def _read_line(number: int, raw: bytes, form: Format) -> Line:
    faults = []
    if len(raw) > MAX_LINE:
        return Line(
            number=number, custom_id=str(number), fault=f"the line is longer than {MAX_LINE / 2**20:g} MiB; shorten it"
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        faults.append(f"the line is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}); save the file as UTF-8")
        text = raw.decode("utf-8", "replace")
    if form == "text":
        return Line(number=number, value=text, custom_id=str(number), fault=faults[0] if faults else None)
    value, fault = _parse(text)
    if fault is not None:
        faults.append(fault)
    custom_id = value.get("custom_id") if isinstance(value, dict) else _find_custom_id(text) if value is None else None
    if custom_id is not None and not isinstance(custom_id, str):
        faults.append(f"custom_id is {_short(custom_id)}; it must be a string")
        if not isinstance(custom_id, int | float) or not math.isfinite(custom_id):
            custom_id = None
    given = custom_id if isinstance(custom_id, str) and not faults else None
    return Line(
        number=number,
        value=value,
        given_id=given,
        fault=faults[0] if faults else None,
        custom_id=str(number) if custom_id is None else custom_id,
    )


def _parse(text: str) -> tuple[object, str | None]:
    """The parsed value and its fault; numbers that JSON does not have, such as NaN, are faults."""
    odd: list[str] = []

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            odd.append(digits)
        return value

    try:
        value = json.loads(text, parse_constant=odd.append, parse_float=number)
    except RecursionError:
        return None, "the line nests objects or lists too deeply; make it flatter"
    except json.JSONDecodeError as error:
        return None, (
            f"the line is not JSON ({error.msg} at character {error.pos}); fix it, or pass --format text if each line "
            "is a prompt"
        )
    except ValueError as error:  # an integer of thousands of digits
        return None, f"the line cannot be read ({error})"
    return value, f"{_short(odd[0])} is not a number in JSON; use a finite number, or remove the field" if odd else None


def _find_custom_id(text: str) -> str | None:
    """The id in a line that is not valid JSON, so that its error can be matched to it."""
    found = _CUSTOM_ID.search(text)
    try:
        return json.loads(found[1]) if found else None
    except ValueError:
        return None


def _find_format(path: Path, form: str) -> Format:
    """The format of `path`: `form`, else by its name, else by its first line; ValueError if it has no lines of text."""
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(0)
        first = next((raw for _, raw in _raw_lines(file)), b"")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is compressed; unpack it first: gunzip --keep, or zcat {path} > requests.jsonl")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise ValueError(
            f"{path} is not text in UTF-8 (it has zero bytes, as UTF-16 has); save it as UTF-8: "
            f"iconv -f UTF-16 -t UTF-8 {path} > requests.jsonl"
        )
    if form != "auto":
        return "jsonl" if form == "jsonl" else "text"
    if path.suffix.lower() == ".json" and first.strip() == b"[":
        raise ValueError(
            f"{path} is a single JSON list, and a batch has one object per line: "
            f"jq --compact-output '.[]' {path} > requests.jsonl"
        )
    named = _SUFFIXES.get(path.suffix.lower())
    if named == "text" and _is_request(first):
        raise ValueError(
            f"{path} has the name of a text file but its first line is a JSON request; pass --format jsonl, or "
            "--format text to use each line as a prompt"
        )
    return named or ("jsonl" if first.lstrip().startswith(b"{") else "text")


def _is_request(raw: bytes) -> bool:
    value, _ = _parse(raw.decode("utf-8", "replace"))
    return isinstance(value, dict) and not {"body", "prompt", "messages"}.isdisjoint(value)


def _short(value: object) -> str:
    text = _TYPES[type(value)] if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
