"""Calls with a tag for each argument, whose text is plain if it is a string: Qwen3-Coder and GLM-4.5."""

from __future__ import annotations

import json
import re

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.format import Rules, ToolFormat
from fastgen_jax.serving.tool_formats.pieces import (
    Piece,
    Schemas,
    Source,
    Steps,
    escaped,
    gather,
    skip,
    spaces,
    typed,
    types_of,
    until,
)
from fastgen_jax.text.adapt import CALL_CLOSE, CALL_OPEN


def _property(schemas: Schemas, function: str, name: str) -> JsonFields:
    properties = schemas.get(function, {}).get("properties")
    found = properties.get(name) if isinstance(properties, dict) else None
    return found if isinstance(found, dict) else {}


def _value(source: Source, ends: tuple[str, ...], key: str, schema: JsonFields, *, first: bool) -> Steps[bool]:
    """Yields an argument: text as it arrives, another value when it is complete; returns whether it was."""
    yield Piece("arguments", f"{'{' if first else ', '}{json.dumps(key, ensure_ascii=False)}: ")
    if types_of(schema) == {"string"}:
        yield Piece("arguments", '"')
        end = yield from until(source, ends, "arguments", escaped)
        if end is not None:
            yield Piece("arguments", '"')
        return end is not None
    text, end = yield from gather(source, ends)
    if end is not None:
        yield Piece("arguments", typed(text, schema))
    return end is not None


# Qwen3-Coder: <tool_call>\n<function=f>\n<parameter=p>\nvalue\n</parameter>\n</function>\n</tool_call>
_FUNCTION, _END_FUNCTION, _PARAMETER = "<function=", "</function>", "<parameter="
_END_PARAMETER = ("\n</parameter>", "</parameter>")


def _read_qwen(source: Source, schemas: Schemas) -> Steps[None]:
    while (mark := (yield from until(source, (CALL_OPEN, _FUNCTION), "content"))) is not None:
        space = ""
        if mark == CALL_OPEN:
            space, mark = yield from gather(source, (_FUNCTION, CALL_CLOSE))
        if mark != _FUNCTION:
            yield Piece("content", CALL_OPEN + space + (mark or ""))
            continue
        name, end = yield from gather(source, (">",))
        if end is None:
            yield Piece("content", f"{CALL_OPEN}{space}{_FUNCTION}{name}")
            return
        name = name.strip("\"' ")
        yield Piece("call", name)
        yield from _qwen_parameters(source, schemas, name)
        yield from spaces(source)
        yield from skip(source, CALL_CLOSE)


def _qwen_parameters(source: Source, schemas: Schemas, name: str) -> Steps[None]:
    first = True
    while True:
        _, mark = yield from gather(source, (_PARAMETER, _END_FUNCTION, CALL_CLOSE))
        if mark != _PARAMETER:
            if mark is not None:
                yield Piece("arguments", "{}" if first else "}")
            if mark == CALL_CLOSE:
                source.text = mark + source.text
            return
        key, end = yield from gather(source, (">",))
        if end is None:
            return
        while not source.text and not source.ended:
            yield None
        source.text = source.text.removeprefix("\n")
        key = key.strip("\"' ")
        if not (yield from _value(source, _END_PARAMETER, key, _property(schemas, name, key), first=first)):
            return
        first = False


def _write_qwen(rules: Rules, name: str, schema: JsonFields) -> str:
    parts = [rules.text(f"{CALL_OPEN}\n{_FUNCTION}{name}>\n")]
    for key, value, needed in _arguments(schema):
        head, end = rules.text(f"{_PARAMETER}{key}>\n"), f"{_END_PARAMETER[0]}\n"
        parts.append(f"({head} {_value_rule(rules, value, end)}){'' if needed else '?'}")
    return " ".join([*parts, rules.text(f"{_END_FUNCTION}\n{CALL_CLOSE}")])


def _arguments(schema: JsonFields) -> list[tuple[str, JsonFields, bool]]:
    """Name, schema, and whether it must be given, of each property of a schema."""
    shared = {key: value for key, value in schema.items() if key in ("$defs", "definitions", "x-guidance")}
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    return [
        (key, {**shared, **(value if isinstance(value, dict) else {})}, key in required) for key, value in properties.items()
    ]


def _value_rule(rules: Rules, schema: JsonFields, end: str) -> str:
    """A value as these formats write it, strings without quotes, and its end."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return f"({' | '.join(rules.text(value) for value in values)}) {rules.text(end)}"
    if types_of(schema) == {"string"}:
        return rules.free(end)
    return f"{rules.json(schema)} {rules.text(end)}"


# GLM-4.5: <tool_call>f\n<arg_key>p</arg_key>\n<arg_value>value</arg_value>\n</tool_call>
_KEY, _END_KEY, _VALUE, _END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


def _read_glm(source: Source, schemas: Schemas) -> Steps[None]:
    while (yield from until(source, (CALL_OPEN,), "content")) is not None:
        name, mark = yield from gather(source, (_KEY, CALL_CLOSE))
        if mark is None or not re.fullmatch(r"\s*[\w.-]+\s*", name):
            yield Piece("content", f"{CALL_OPEN}{name}{mark or ''}")
            continue
        name, first = name.strip(), True
        yield Piece("call", name)
        while mark == _KEY:
            key, _ = yield from gather(source, (_END_KEY,))
            _, end = yield from gather(source, (_VALUE,))
            if end is None or not (
                yield from _value(source, (_END_VALUE,), key.strip(), _property(schemas, name, key.strip()), first=first)
            ):
                return
            first = False
            _, mark = yield from gather(source, (_KEY, CALL_CLOSE))
        if mark is not None:
            yield Piece("arguments", "{}" if first else "}")


def _write_glm(rules: Rules, name: str, schema: JsonFields) -> str:
    parts = [rules.text(f"{CALL_OPEN}{name}\n")]
    for key, value, needed in _arguments(schema):
        head, end = rules.text(f"{_KEY}{key}{_END_KEY}\n{_VALUE}"), f"{_END_VALUE}\n"
        parts.append(f"({head} {_value_rule(rules, value, end)}){'' if needed else '?'}")
    return " ".join([*parts, rules.text(CALL_CLOSE)])


QWEN = ToolFormat(
    name="qwen3-coder",
    recognizes=lambda template: _FUNCTION in template and _PARAMETER in template,
    read=_read_qwen,
    write=_write_qwen,
    marks=(CALL_OPEN, CALL_CLOSE),
)
GLM = ToolFormat(
    name="glm",
    recognizes=lambda template: _KEY in template and _VALUE in template,
    read=_read_glm,
    write=_write_glm,
    marks=(CALL_OPEN, CALL_CLOSE, _KEY, _END_KEY, _VALUE, _END_VALUE),
)
