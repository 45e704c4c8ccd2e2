"""The fields that hold an answer to a grammar: OpenAI's `response_format`, and the names that vLLM's clients use."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.serving.fields import Body, short
from fastgen_jax.text.grammar import Grammar
from fastgen_jax.text.schemas import fitted
from fastgen_jax.text.tags import Tag, tagged

_FIELDS_OF_TYPE = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "regex": ("regex",),
    "choice": ("choice",),
    "grammar": ("grammar",),
    "structural_tag": ("structures", "triggers"),
}
_TYPE_OF_FIELD = {name: kind for kind, names in _FIELDS_OF_TYPE.items() for name in names}
Choices = Annotated[list[str], Field(min_length=1, max_length=10_000)]


class Guide(NamedTuple):
    """The grammar that a request demands of its answer."""

    field: str
    """The field that demands it."""
    grammar: Grammar
    relaxed: tuple[str, ...] = ()
    """What the grammar leaves out of the schema."""


class JsonSchema(Body):
    """A named schema. With `strict`, one that cannot be followed to the letter is refused; otherwise it is relaxed."""

    name: str = "answer"
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class Structure(Body):
    """A part of the text between two fixed strings that follows a schema."""

    begin: Annotated[str, Field(min_length=1)]
    schema_: JsonObject | None = Field(None, alias="schema")
    end: str


class ResponseFormat(Body):
    """Free text, any JSON object, JSON that follows a schema, or (extensions) text that follows another grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, description="Extension.")
    choice: Choices | None = Field(None, description="Extension: the answer is one of these.")
    grammar: str | None = Field(None, description="Lark, or GBNF as in llama.cpp.")
    structures: Annotated[list[Structure], Field(min_length=1)] | None = Field(None, description="Extension.")
    triggers: list[str] | None = Field(None, description="Extension: a structure begins where one of these occurs.")

    @model_validator(mode="after")
    def _has_its_fields(self) -> ResponseFormat:
        needed = _FIELDS_OF_TYPE[self.type]
        for name, kind in _TYPE_OF_FIELD.items():
            if (getattr(self, name) is not None) != (name in needed):
                raise ValueError(f"{name} and type {kind!r} belong together; set both or neither")
        return self

    def guide(self, field: str) -> Guide | None:
        """The grammar of the answer; None for free text."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return _guide_of_schema(field, {"type": "object"})
            case "json_schema":
                assert self.json_schema is not None
                given = self.json_schema
                schema = given.schema_ or {}
                return _guide_of_schema(field, schema, strict=bool(given.strict))
            case "regex":
                return Guide(field, Grammar(kind="regex", source=self.regex or ""))
            case "choice":
                return Guide(field, Grammar.choice(self.choice or ()))
            case "grammar":
                return Guide(field, Grammar(kind="grammar", source=self.grammar or ""))
            case "structural_tag":
                return _guide_of_tags(field, self)


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one constraint."""

    json_: Annotated[JsonObject | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: Annotated[bool | None, Field(description="Means nothing here.")] = None
    disable_additional_properties: Literal[False] | None = None


class Guided(Body):
    """Mixin: the fields that demand a grammar. Those that are not `response_format` are extensions, as in vLLM."""

    NAMES: ClassVar = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    structural_tag: str | None = Field(None, description="JSON with structures and triggers.")
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = Field(None, description="Means nothing here.")

    @model_validator(mode="after")
    def _one_grammar(self) -> Guided:
        named = list(self.constraints)
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are several grammars for one answer; keep one of them")
        return self

    @property
    def is_guided(self) -> bool:
        """Whether a field demands a grammar."""
        return bool(self.constraints)

    def guide(self) -> Guide | None:
        """The grammar that the request demands, if any. A large schema takes up to a second.

        Raises GrammarError for a strict schema that cannot be followed to the letter, or one that is malformed.
        """
        for field, value in self.constraints.items():
            return self._guide(field, value)
        return None

    @property
    def constraints(self) -> dict[str, object]:
        """The fields that demand a grammar, and their values."""
        form, given = self.response_format, self.structured_outputs
        found: dict[str, object] = {}
        if form is not None and form.type != "text":
            found["response_format"] = form
        if given is not None:
            values = (given.json_, given.regex, given.choice, given.grammar, given.json_object or None, given.structural_tag)
            pairs = zip(self.NAMES, values, strict=True)
            found |= {f"structured_outputs.{name}": value for name, value in pairs if value is not None}
        fields = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag")
        return found | {name: value for name in fields if (value := getattr(self, name)) is not None}

    def _guide(self, field: str, value: object) -> Guide | None:
        given = self.structured_outputs or StructuredOutputs()
        space = "" if given.disable_any_whitespace else given.whitespace_pattern or self.guided_whitespace_pattern
        match field.removeprefix("structured_outputs.").removeprefix("guided_"), value:
            case "response_format", ResponseFormat():
                return value.guide(field)
            case "json", dict() | str():
                return _guide_of_schema(field, _parsed_schema(field, value), space=space)
            case "json_object", _:
                return _guide_of_schema(field, {"type": "object"}, space=space)
            case "regex", str():
                return Guide(field, Grammar(kind="regex", source=value))
            case "choice", list():
                return Guide(field, Grammar.choice(value))
            case "grammar", str():
                return Guide(field, Grammar(kind="grammar", source=value))
            case _:
                return _guide_of_tags(field, _parsed_tags(field, str(value)))


def _guide_of_schema(field: str, schema: JsonFields, *, strict: bool = False, space: str | None = None) -> Guide:
    usable = fitted(schema, strict=strict)
    return Guide(field, Grammar.json_schema(usable.schema, space=space), usable.relaxed)


def _guide_of_tags(field: str, form: ResponseFormat) -> Guide:
    tags, relaxed = [], []
    for structure in form.structures or ():
        trigger = next((t for t in form.triggers or () if t and structure.begin.startswith(t)), None)
        if trigger is None:
            raise ValueError(
                f"{field}: the structure {short(structure.begin)} starts with none of the triggers "
                f"{short(form.triggers)}; add its start to the triggers"
            )
        usable = fitted(structure.schema_ or {}, strict=False)
        relaxed += usable.relaxed
        tags.append(Tag(trigger=trigger, begin=structure.begin, schema=usable.schema, end=structure.end))
    return Guide(field, tagged(tags), tuple(dict.fromkeys(relaxed)))


def _parsed_schema(field: str, given: JsonObject | str) -> JsonFields:
    if isinstance(given, dict):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise ValueError(f"{field} is {short(given)}, which is not a JSON object; pass the schema as an object")
    return schema


def _parsed_tags(field: str, given: str) -> ResponseFormat:
    try:
        return ResponseFormat.model_validate({"type": "structural_tag", **json.loads(given)})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{field} is {short(given)}; it must be JSON with structures (begin, schema, end) and triggers: "
            f"{short(str(error))}"
        ) from None
