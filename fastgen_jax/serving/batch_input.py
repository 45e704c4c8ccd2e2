"""The input of a batch: whether it is JSON lines or plain text, and what each of its lines asks for.

What a file holds is decided once, for the whole file. A line that is not what its file holds, or not sound, has a
`fault` and asks for nothing; no line stops the reading of the others.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

Format = Literal["jsonl", "text"]
FORMATS = ("auto", "jsonl", "text")
URLS = ("/v1/completions", "/v1/chat/completions")
MAX_LINE = 64 * 2**20  # bytes; the largest body that a server takes by default is a quarter of it

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
    value: Any = None
    """What its JSON says, or the line itself in a file of plain text."""
    given_id: str | None = None
    """Its `custom_id`, if it has a sound one."""
    custom_id: Any
    """What its answer is to carry as `custom_id`: as given, or its number."""
    fault: str | None = None
    """Why it cannot be asked."""

    def request(self, model: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """URL and body; `model` and `options` go into bodies that do not have them. ValueError if it asks for nothing."""
        if self.fault is not None:
            raise ValueError(self.fault)
        value = self.value
        if isinstance(value, str):
            return URLS[0], {"model": model, "prompt": value, **options}
        if not isinstance(value, dict):
            raise ValueError(
                f"the line is {_TYPES[type(value)]}; it must be an object (OpenAI's batch format, or with "
                "'prompt' or 'messages') or a string"
            )
        if "body" in value:
            url, body = value.get("url"), value["body"]
            if url not in URLS:
                raise ValueError(f"url is {_short(url) if 'url' in value else 'missing'}; choose one of {', '.join(URLS)}")
            if value.get("method", "POST") != "POST":
                raise ValueError(f"method is {_short(value['method'])}; it must be 'POST'")
            if not isinstance(body, dict):
                raise ValueError(f"body is {_TYPES[type(body)]}; it must be an object, the request itself")
            if body.get("stream"):
                raise ValueError("body has stream=true; leave it out, an answer is one line")
        elif "prompt" in value or "messages" in value:
            url = URLS["messages" in value]
            body = {name: item for name, item in value.items() if name != "custom_id"}
        else:
            raise ValueError(
                "an object needs 'body' (OpenAI's batch format), 'prompt' or 'messages'; this one has "
                f"{', '.join(map(_short, list(value)[:5])) or 'nothing'}"
            )
        own = {name: item for name, item in body.items() if name != "model" or item is not None}
        return url, {"model": model, **options, **own}


class BatchInput:
    """A file of requests, read a line at a time; once from end to end before the first is asked, for its ids.

    Memory holds 16 bytes for each line that has an id. Raises ValueError for a file that is none of lines of UTF-8.
    """

    def __init__(self, path: Path, *, form: str = "auto") -> None:
        if form not in FORMATS:
            raise ValueError(f"format is {form!r}; choose one of {', '.join(FORMATS)}")
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give the file of requests")
        self.path = path
        self.form: Format = _find_format(path, form)
        self.num_lines = 0
        """Lines that are not blank."""
        self.end = 0
        """The number of the last of them, plus 1."""
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
        """For each line whose id another had before: that other line."""
        ids, numbers = np.frombuffer(self._ids, np.int64), np.frombuffer(self._numbers, np.int64)
        order = np.argsort(ids, kind="stable")
        is_repeat = np.append(False, ids[order][1:] == ids[order][:-1])[: len(ids)]
        group = np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(ids))))
        firsts = numbers[order[group]]
        return dict(zip(numbers[order[is_repeat]].tolist(), firsts[is_repeat].tolist(), strict=True))

    def could_be(self, number: int, custom_id: Any) -> bool:
        """Whether there is a line of that number and it could have that id."""
        place = bisect_left(self._numbers, number)
        if place < len(self._numbers) and self._numbers[place] == number:
            return hash(custom_id) == self._ids[place] if isinstance(custom_id, str) else False
        return number < self.end


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, without byte order mark and line end; one that is too long is cut after MAX_LINE + 1."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        rest = raw
        while len(rest) == MAX_LINE + 1 and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        # Also inside a file: `cat` puts one there.
        line = raw.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        if line.strip():
            yield number, line
        number += 1


def _read_line(number: int, raw: bytes, form: Format) -> Line:
    faults = []
    if len(raw) > MAX_LINE:
        return Line(
            number=number, custom_id=str(number), fault=f"the line is longer than {MAX_LINE / 2**20:g} MiB; make it shorter"
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


def _parse(text: str) -> tuple[Any, str | None]:
    """What JSON says, and what is wrong with it; numbers that JSON does not have, such as NaN, are wrong."""
    odd: list[str] = []

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            odd.append(digits)
        return value

    try:
        value = json.loads(text, parse_constant=odd.append, parse_float=number)
    except RecursionError:
        return None, "the line has too many objects or lists inside one another; make it flatter"
    except json.JSONDecodeError as error:
        return None, (
            f"the line is not JSON ({error.msg} at character {error.pos}); mend it, or if the file holds plain "
            "prompts, say so by --format text"
        )
    except ValueError as error:  # an integer of thousands of digits
        return None, f"the line cannot be read ({error})"
    return value, f"{_short(odd[0])} is not a number in JSON; write a finite one, or leave it out" if odd else None


def _find_custom_id(text: str) -> str | None:
    """The id in a line that is not sound JSON, so that its error can be told from others."""
    found = _CUSTOM_ID.search(text)
    try:
        return json.loads(found[1]) if found else None
    except ValueError:
        return None


def _find_format(path: Path, form: str) -> Format:
    """What `path` holds, by what was said, by its name, by its first line; ValueError if it is no file of lines."""
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
            f"{path} is one list over many lines, and a batch is an object a line: "
            f"jq --compact-output '.[]' {path} > requests.jsonl"
        )
    named = _SUFFIXES.get(path.suffix.lower())
    if named == "text" and _is_request(first):
        raise ValueError(
            f"{path} is named as plain text but its first line is a request in JSON; say --format jsonl, or "
            "--format text to ask each line as a prompt"
        )
    return named or ("jsonl" if first.lstrip().startswith(b"{") else "text")


def _is_request(raw: bytes) -> bool:
    value, _ = _parse(raw.decode("utf-8", "replace"))
    return isinstance(value, dict) and not {"body", "prompt", "messages"}.isdisjoint(value)


def _short(value: Any) -> str:
    text = _TYPES[type(value)] if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
