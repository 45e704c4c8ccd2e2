"""Llama: an answer that is one JSON object per call, `{"name": ..., "parameters": ...}`, or a Python list of calls."""

from __future__ import annotations

import ast
import json
import re

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.format import Rules, ToolFormat
from fastgen_jax.serving.tool_formats.pieces import Piece, Schemas, Source, Steps, json_call, skip, spaces, until

_TAG = "<|python_tag|>"
_START, _END = "<|python_start|>", "<|python_end|>"
_SEPARATORS = "; ,\n"


def _read_json(source: Source, schemas: Schemas) -> Steps[None]:
    yield from spaces(source)
    yield from skip(source, _TAG)
    while (yield from json_call(source, ())):
        while source.text[:1] in _SEPARATORS:
            source.text = source.text.lstrip(_SEPARATORS)
            if source.text or source.ended:
                break
            yield None
        yield from skip(source, _TAG)
    yield from until(source, (), "content")


def _write_json(rules: Rules, name: str, schema: JsonFields) -> str:
    head = rules.text(f'{{"name": {json.dumps(name)}, "parameters": ')
    return " ".join((head, rules.json(schema), rules.text("}")))


_CALL = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\(\s*")
_MAY_BE_CALL = re.compile(r"\s*(?:[A-Za-z_][\w.-]*\s*)?\Z")
_ARGUMENT = re.compile(r"\s*([A-Za-z_]\w*)\s*=")
_OPENING, _CLOSING = "([{", ")]}"
_NAMES = {"true": True, "false": False, "null": None}


def _read_python(source: Source, schemas: Schemas) -> Steps[None]:
    yield from spaces(source)
    yield from skip(source, _START)
    yield from spaces(source)
    if source.text.startswith("["):
        text = source.text
        while _MAY_BE_CALL.match(source.text, 1) and not source.ended:
            yield None
        text = source.text
        if _CALL.match(text, 1):
            source.take(1)
            while (yield from _python_call(source)):
                pass
            yield from skip(source, _END)
    yield from until(source, (), "content")


def _python_call(source: Source) -> Steps[bool]:
    """Reads `name(argument=value, ...)` and what follows it; returns whether another call comes."""
    while (match := _CALL.match(source.text)) is None:
        if source.ended or not _MAY_BE_CALL.match(source.text):
            return False
        yield None
    source.take(match.end())
    yield Piece("call", match[1])
    yield Piece("arguments", "{")
    first = True
    while True:
        text, end = yield from _python_value(source)
        argument = _ARGUMENT.match(text)
        if argument is not None and end:
            value = json.dumps(_literal(text[argument.end() :].strip()), ensure_ascii=False)
            yield Piece("arguments", f"{'' if first else ', '}{json.dumps(argument[1])}: {value}")
            first = False
        if end == ")":
            yield Piece("arguments", "}")
            break
        if end != ",":
            return False
    yield from spaces(source)
    return source.take(1) == ","


def _python_value(source: Source) -> Steps[tuple[str, str]]:
    """Waits for the comma or bracket after a value; returns the text before it, and that character."""
    depth, quote, position = 0, "", 0
    while True:
        while position < len(source.text):
            character = source.text[position]
            if quote:
                if character == "\\":
                    position += 1
                elif character == quote:
                    quote = ""
            elif character in "'\"":
                quote = character
            elif depth == 0 and character in ",)":
                text = source.take(position)
                return text, source.take(1)
            elif character in _OPENING:
                depth += 1
            elif character in _CLOSING:
                depth -= 1
            position += 1
        if source.ended:
            return source.take(len(source.text)), ""
        yield None


def _literal(text: str) -> object:
    """The value of a Python literal, in which JSON's names are allowed too; other text is a string."""
    try:
        tree = ast.parse(text, mode="eval")
        named = _Names().visit(tree)
        value = ast.literal_eval(named)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return value


class _Names(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_NAMES[node.id]) if node.id in _NAMES else node


def _write_python(rules: Rules, name: str, schema: JsonFields) -> str:
    """The arguments in JSON's notation, which `_literal` reads."""
    properties = schema.get("properties") or {}
    required = [key for key in properties if key in (schema.get("required") or ())]
    optional = [key for key in properties if key not in required]
    shared = {key: value for key, value in schema.items() if key in ("$defs", "definitions", "x-guidance")}

    def argument(key: str) -> str:
        value = properties[key] if isinstance(properties[key], dict) else {}
        return f"{rules.text(f'{key}=')} {rules.json({**shared, **value})}"

    parts = [rules.text(f"{name}(")]
    for i, key in enumerate(required):
        parts += [rules.text(", ")] if i else []
        parts.append(argument(key))
    if required:
        parts += [f"({rules.text(', ')} {argument(key)})?" for key in optional]
    elif optional:  # any one of them may be the first
        tails = [
            " ".join([argument(key), *(f"({rules.text(', ')} {argument(other)})?" for other in optional[i + 1 :])])
            for i, key in enumerate(optional)
        ]
        parts.append(f"({' | '.join(tails)})?")
    return " ".join([*parts, rules.text(")")])


JSON = ToolFormat(
    name="llama",
    recognizes=lambda template: '"parameters":' in template and '{"name":' in template and "<|start_header_id|>" in template,
    read=_read_json,
    write=_write_json,
    marks=(_TAG,),
    between="; ",
)
PYTHONIC = ToolFormat(
    name="pythonic",
    recognizes=lambda template: re.search(r"\[\w+\(\w+=\w+", template) is not None,
    read=_read_python,
    write=_write_python,
    marks=(_START, _END),
    around=("[", "]"),
    between=", ",
)
