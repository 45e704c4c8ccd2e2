"""DeepSeek V3 and R1 (`function<sep>name` and JSON in a code block), and V3.1 (`name<sep>{...}`)."""

from __future__ import annotations

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.format import Rules, ToolFormat
from fastgen_jax.serving.tool_formats.pieces import Piece, Schemas, Source, Steps, gather, json_value, until

_CALLS, _END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _END_CALL, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_FENCE = "```json\n"


def _read(source: Source, schemas: Schemas) -> Steps[None]:
    while (mark := (yield from until(source, (_CALLS, _CALL, _END_CALLS), "content"))) is not None:
        if mark != _CALL:
            continue
        kind, mark = yield from gather(source, (_SEPARATOR, _END_CALL))
        if mark != _SEPARATOR:
            yield Piece("content", _CALL + kind + (mark or ""))
            continue
        before, mark = yield from gather(source, ("{", _END_CALL))
        name = before.partition("\n")[0].strip() or kind.strip()
        yield Piece("call", name)
        if mark == "{":
            source.text = mark + source.text
            yield from json_value(source, (_END_CALL,))
            _, mark = yield from gather(source, (_END_CALL,))
        elif mark is not None:
            yield Piece("arguments", "{}")


def _write_fenced(rules: Rules, name: str, schema: JsonFields) -> str:
    head, end = rules.text(f"{_CALL}function{_SEPARATOR}{name}\n{_FENCE}"), rules.text(f"\n```{_END_CALL}")
    return f"{head} {rules.json(schema)} {end}"


def _write_plain(rules: Rules, name: str, schema: JsonFields) -> str:
    return f"{rules.text(f'{_CALL}{name}{_SEPARATOR}')} {rules.json(schema)} {rules.text(_END_CALL)}"


_MARKS = (_CALLS, _END_CALLS, _CALL, _END_CALL, _SEPARATOR)
FENCED = ToolFormat(
    name="deepseek-v3",
    recognizes=lambda template: _CALL in template and "```json" in template,
    read=_read,
    write=_write_fenced,
    marks=_MARKS,
    around=(_CALLS, _END_CALLS),
)
PLAIN = ToolFormat(
    name="deepseek-v3.1",
    recognizes=lambda template: _CALL in template and "```json" not in template,
    read=_read,
    write=_write_plain,
    marks=_MARKS,
    around=(_CALLS, _END_CALLS),
    between="",
)
