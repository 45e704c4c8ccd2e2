"""Grammars of free text in which some parts, marked by fixed strings, must follow a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.grammar import JSON_LAYOUT, Grammar

_FREE = "(.|\\n)*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A part of a text: `begin`, JSON that follows `schema`, and `end`."""

    trigger: str
    """The start of `begin`, which the free text contains nowhere else."""
    begin: str
    schema: JsonFields
    end: str


def tagged(tags: Sequence[Tag]) -> Grammar:
    """Returns the grammar of any text in which each trigger starts one of the tags."""
    numbers = range(len(tags))
    rules = [f"start: ({' | '.join(f'tag_{i}' for i in numbers)})* rest", "rest: TEXT", f"TEXT: /{_FREE}/"]
    for i, tag in enumerate(tags):
        schema = {**tag.schema, "x-guidance": {**JSON_LAYOUT, **tag.schema.get("x-guidance", {})}}
        # A lazy lexeme ends with the first occurrence of the trigger.
        rules.append(f"open_{i}[lazy]: TEXT {_quoted(tag.trigger)}")
        rules.append(f"schema_{i}: %json {json.dumps(schema, ensure_ascii=False)}")
        rules.append(f"tag_{i}: open_{i} {_quoted(tag.begin[len(tag.trigger) :])} schema_{i} {_quoted(tag.end)}")
    return Grammar(kind="lark", source="\n".join(rules))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
