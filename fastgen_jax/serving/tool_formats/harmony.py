"""Harmony, the format of gpt-oss: messages in channels. "analysis" is reasoning, a recipient makes a message a call.

An answer: `<|channel|>analysis<|message|>...<|end|>`, then
`<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>`.
"""

from __future__ import annotations

import re

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.format import Rules, ToolFormat
from fastgen_jax.serving.tool_formats.pieces import Piece, Schemas, Source, Steps, gather, until

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
NEXT = f"{_START}assistant"  # between two messages; the prompt ends with it
ANALYSIS, FINAL = f"{_CHANNEL}analysis{_MESSAGE}", f"{_CHANNEL}final{_MESSAGE}"
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


def _read(source: Source, schemas: Schemas) -> Steps[None]:
    while True:
        while not source.text.strip() and not source.ended:
            yield None
        first = source.text.lstrip()
        is_header = first.startswith(("<", "to=")) or "to=".startswith(first)
        if not is_header:  # not in the format
            yield from until(source, (), "content")
        header, mark = yield from gather(source, (_MESSAGE,))
        if mark is None:
            if header.strip() and not header.lstrip().startswith("<|"):
                yield Piece("content", header)
            return
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            yield Piece("call", recipient[1])
            yield from until(source, _ENDS, "arguments")
        else:
            yield from until(source, _ENDS, "reasoning" if f"{_CHANNEL}analysis" in header else "content")
        if source.ended and not source.text:
            return


def _write(rules: Rules, name: str, schema: JsonFields) -> str:
    head = f"{_CHANNEL}commentary to=functions.{name} {_CONSTRAIN}json{_MESSAGE}"
    return f"{rules.text(head)} {rules.json(schema)}"  # <|call|> ends the sequence


FORMAT = ToolFormat(
    name="harmony",
    recognizes=lambda template: _CHANNEL in template and _MESSAGE in template,
    read=_read,
    write=_write,
    marks=(_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS[:3]),
    between=f"<|end|>{NEXT}",
    channels=True,
)
