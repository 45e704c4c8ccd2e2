"""`[TOOL_CALLS]` of Mistral: a JSON array of calls, or `[TOOL_CALLS]name[ARGS]{...}` for each call (since tokenizer v11)."""

from __future__ import annotations

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.format import Rules, ToolFormat
from fastgen_jax.serving.tool_formats.pieces import (
    Piece,
    Schemas,
    Source,
    Steps,
    gather,
    json_call,
    json_value,
    spaces,
    until,
)

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def _read(source: Source, schemas: Schemas) -> Steps[None]:
    while (yield from until(source, (_CALLS,), "content")) is not None:
        yield from spaces(source)
        if source.text[:1] in ("[", "{"):
            source.text = source.text.removeprefix("[")
            while (yield from json_call(source, (_CALLS,))):
                yield from spaces(source)
                if source.text[:1] != ",":
                    source.text = source.text.removeprefix("]")
                    break
                source.take(1)
            continue
        while source.text and not source.ended and "{" not in source.text and _ARGUMENTS not in source.text:
            yield None
        head, mark = yield from gather(source, (_ARGUMENTS, "{"))
        if mark is None:
            yield Piece("content", _CALLS + head)
            continue
        if mark == "{":
            source.text = mark + source.text
        yield Piece("call", head.partition(_ID)[0].strip())
        yield from json_value(source, (_CALLS,))


def _write_array(rules: Rules, name: str, schema: JsonFields) -> str:
    return " ".join((rules.text(f'{{"name": "{name}", "arguments": '), rules.json(schema), rules.text("}")))


def _write_named(rules: Rules, name: str, schema: JsonFields) -> str:
    return f"{rules.text(_CALLS + name + _ARGUMENTS)} {rules.json(schema)}"


ARRAY = ToolFormat(
    name="mistral",
    recognizes=lambda template: _CALLS in template and _ARGUMENTS not in template,
    read=_read,
    write=_write_array,
    marks=(_CALLS,),
    around=(f"{_CALLS}[", "]"),
    id_length=9,
    between=", ",
)
NAMED = ToolFormat(
    name="mistral-v11",
    recognizes=lambda template: _CALLS in template and _ARGUMENTS in template,
    read=_read,
    write=_write_named,
    marks=(_CALLS, _ID, _ARGUMENTS),
    between="",
    id_length=9,
)
