"""`<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen 2.5 and 3, SmolLM, and many others."""

from __future__ import annotations

import json

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.format import Rules, ToolFormat
from fastgen_jax.serving.tool_formats.pieces import Piece, Schemas, Source, Steps, gather, json_call, until
from fastgen_jax.text.adapt import CALL_CLOSE, CALL_OPEN


def _read(source: Source, schemas: Schemas) -> Steps[None]:
    """Anything between the tags that is not a call stays content, with its tags."""
    while (yield from until(source, (CALL_OPEN,), "content")) is not None:
        is_call = yield from json_call(source, (CALL_CLOSE,))
        text, close = yield from gather(source, (CALL_CLOSE,))
        if not is_call:
            yield Piece("content", CALL_OPEN + text + (close or ""))


def _write(rules: Rules, name: str, schema: JsonFields) -> str:
    head = rules.text(f'{CALL_OPEN}\n{{"name": {json.dumps(name)}, "arguments": ')
    return " ".join((head, rules.json(schema), rules.text(f"}}\n{CALL_CLOSE}")))


FORMAT = ToolFormat(
    name="hermes",
    recognizes=lambda template: CALL_OPEN in template and "<function=" not in template and "<arg_key>" not in template,
    read=_read,
    write=_write,
    marks=(CALL_OPEN, CALL_CLOSE),
)
