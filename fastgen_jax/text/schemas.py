"""JSON schemas that llguidance can enforce, made from those that it cannot."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.grammar import JSON_LAYOUT, GrammarError, check_size, library

_DATA = frozenset({"const", "default", "enum", "examples", "example"})  # words whose values are no schemas
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})  # name -> schema
_KEPT_BESIDE_REF = frozenset({"$ref", "$defs", "definitions", "$id", "id", "$schema", "$anchor"})
_COMBINING = frozenset({"allOf", "not", "if", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"})
_CHOOSING = frozenset({"anyOf", "oneOf", "$ref"})
_OTHERS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"})
_LENIENT = {**JSON_LAYOUT, "lenient": True}
_CACHED = 256  # schemas
_MOST_ATTEMPTS = 12
# llguidance needs a time in proportion to the square of an object's number of optional properties, 2 s for so many.
MAX_PROPERTIES = 3000


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A schema that can be enforced."""

    schema: JsonFields
    relaxed: tuple[str, ...] = ()
    """What is not enforced although the original schema asks for it, such as "oneOf" or "format url"."""


def fitted(schema: JsonFields, *, strict: bool) -> Fitted:
    """Returns `schema` if it can be enforced to the letter, else a more permissive one that can.

    Raises GrammarError for a malformed schema, for one that is too large to be compiled beside an engine and, if `strict`,
    for one that would have to be relaxed.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(f"the json schema cannot be used: {type(error).__name__}: {error}") from None
    check_size("json schema", text)
    _check_properties(schema)
    error, usable = _fitted(text)
    if usable is None or (strict and usable.relaxed):
        words = f", and {', '.join(usable.relaxed)} cannot be enforced" if usable else ""
        remedy = "remove them, or leave out strict, so that they are ignored" if usable else "correct it"
        because = "strict is true" if usable else f"the json schema cannot be used: {error}"
        raise GrammarError(f"{because}{words}; {remedy}")
    return usable


def closed(schema: JsonFields) -> JsonFields:
    """The schema whose objects have no properties but those that it names, unless it says what others may be.

    Unchanged if several of its parts describe the same object, because one may name what another one requires.
    """
    nodes: list[JsonFields] = []

    def note(node: JsonFields) -> JsonFields:
        nodes.append(node)
        return node

    _changed(schema, note)
    if any(_COMBINING & node.keys() or ("properties" in node and _CHOOSING & node.keys()) for node in nodes):
        return schema
    return _changed(schema, _closed)


def _closed(node: JsonFields) -> JsonFields:
    named, required = node.get("properties"), node.get("required", [])
    if not named or not isinstance(named, dict) or _OTHERS & node.keys() or not set(required) <= named.keys():
        return node
    return {**node, "additionalProperties": False}


def _check_properties(schema: JsonFields) -> None:
    """GrammarError if the objects of a schema have more properties than can be compiled in about two seconds."""
    counts: list[int] = []
    left: list[object] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            counts += [len(part["properties"])] if isinstance(part.get("properties"), dict) else []
            left += part.values()
        elif isinstance(part, list):
            left += part
    if sum(count**2 for count in counts) > MAX_PROPERTIES**2:
        raise GrammarError(
            f"the json schema cannot be used: its largest object has {max(counts):,} properties and all objects "
            f"{sum(counts):,}; one with {MAX_PROPERTIES:,}, or the same work for several, is the limit; simplify it"
        )


@functools.lru_cache(maxsize=_CACHED)
def _fitted(text: str) -> tuple[str, Fitted | None]:
    """The reason why the schema cannot be enforced, and what can; None if nothing of the kind."""
    schema: JsonFields = json.loads(text)
    error, _ = _problems(schema, JSON_LAYOUT)
    if error is None:
        return "", Fitted(schema=schema)
    first, relaxed = error, []
    for _ in range(_MOST_ATTEMPTS):
        error, warnings = _problems(schema, _LENIENT)
        if error is None:
            guidance = {"x-guidance": {**_LENIENT, **schema.get("x-guidance", {})}}
            words = dict.fromkeys([*(word for warning in warnings for word in _words(warning)), *relaxed])
            return first, Fitted(schema={**schema, **guidance}, relaxed=tuple(words))
        remedy = next((r for r in _REMEDIES if re.search(r[0], error) and r[1] not in relaxed), None)
        place = re.search(r"#/([\w$~/.%-]+)$", error)
        if remedy is not None:
            relaxed.append(remedy[1])
            schema = _changed(schema, remedy[2])
        elif place is None or not _empty(schema, place[1].split("/")):
            return error, None
        else:
            relaxed.append(f"#/{place[1]}")
    return first, None


def _empty(schema: Any, place: list[str]) -> bool:
    """Makes the part of a schema at `place` allow every value of its type; false if there is no such part."""
    *parents, last = place
    for name in parents:
        schema = schema.get(name) if isinstance(schema, dict) else None
    part = schema.get(last) if isinstance(schema, dict) else None
    if not isinstance(part, dict) or set(part) <= {"type"}:
        return False
    schema[last] = {"type": part["type"]} if "type" in part else {}
    return True


def _problems(schema: JsonFields, options: JsonFields) -> tuple[str | None, list[str]]:
    """The error of llguidance, None if there is none, and its warnings."""
    matchers = library().LLMatcher
    try:
        source = matchers.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), defaults=options)
    except ValueError as error:
        return str(error), []
    failed, messages = matchers.validate_grammar_with_warnings(source)
    return (" ".join(messages[0].partition("<state>")[0].split()), []) if failed else (None, messages)


def _words(warning: str) -> list[str]:
    """The words of a schema that a warning says are ignored."""
    if warning.startswith("Unimplemented keys: "):
        return re.findall(r'"([^"]*)"', warning)
    if warning.startswith("Unknown format: "):
        return ["format " + re.sub(r" \(\d+ times\)$", "", warning.removeprefix("Unknown format: "))]
    return [warning.partition(" ")[0]]


Change = Callable[[JsonFields], JsonFields]


def _changed(schema: Any, change: Change) -> Any:
    """A schema with `change` applied to it and to every schema in it."""
    if isinstance(schema, list):
        return [_changed(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {}
    for name, value in change(schema).items():
        if name in _DATA:
            inner[name] = value
        elif name in _MAPS and isinstance(value, dict):
            inner[name] = {key: _changed(item, change) for key, item in value.items()}
        else:
            inner[name] = _changed(value, change)
    return inner


def _only_reference(schema: JsonFields) -> JsonFields:
    """Without the words beside a reference, which no draft before 2019 reads anyway."""
    if "$ref" not in schema:
        return schema
    return {name: value for name, value in schema.items() if name in _KEPT_BESIDE_REF}


def _without_difficult_patterns(schema: JsonFields) -> JsonFields:
    kept = dict(schema)
    if isinstance(kept.get("pattern"), str) and not _is_usable(kept["pattern"]):
        del kept["pattern"]
    named = kept.get("patternProperties")
    if isinstance(named, dict):
        kept["patternProperties"] = {pattern: value for pattern, value in named.items() if _is_usable(pattern)}
    return kept


def _is_usable(pattern: str) -> bool:
    """Whether llguidance reads it; a malformed one counts as usable, because it is a mistake and not to be left out."""
    try:
        re.compile(pattern)
    except re.error:
        return True
    matchers = library().LLMatcher
    text = json.dumps({"type": "string", "pattern": pattern})
    return not matchers.validate_grammar_with_warnings(matchers.grammar_from_json_schema(text))[0]


def _without(*names: str) -> Change:
    return lambda schema: {name: value for name, value in schema.items() if name not in names}


def _without_foreign_references(schema: JsonFields) -> JsonFields:
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        return _without("$ref")(schema)
    return schema


# What an error says, the name of the remedy, and the remedy.
_REMEDIES: tuple[tuple[str, str, Change], ...] = (
    ("circular references with sibling", "words beside $ref", _only_reference),
    ("patternProperty", "patternProperties", _without("patternProperties")),
    ("regex", "pattern", _without_difficult_patterns),
    ("not present in a registry", "$ref to another document", _without_foreign_references),
    ("min/maxProperties", "minProperties and maxProperties", _without("minProperties", "maxProperties")),
    ("incompatible types|intersection|Unsatisfiable", "allOf", _without("allOf")),
)
