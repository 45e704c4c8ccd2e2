"""Answers held to a grammar: schemas that must be relaxed, and the names of the fields in OpenAI's and vLLM's servers."""

from __future__ import annotations

import asyncio
import json
import re
import threading

import openai
import pydantic
import pytest

from fastgen_jax.text.grammar import Grammar, GrammarCompiler, GrammarError
from fastgen_jax.text.schemas import closed, fitted
from tests.serving.tiny_server import MODEL, ask, events, with_server

COMPLETION = {"model": MODEL, "prompt": "x", "max_tokens": 60, "temperature": 1.5, "seed": 3}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 90, "temperature": 0}
HEADER = "x-fastgen-schema-relaxed"


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


# Schemas

RELAXED = [
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["oneOf"]),
    ({"type": "string", "format": "css-color"}, ["format css-color"]),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, ["uniqueItems"]),
    ({"type": "object", "dependencies": {"a": ["b"]}}, ["dependencies"]),
    ({"not": {"type": "null"}}, ["not"]),
    ({"type": "string", "pattern": "^(?!x).*$"}, ["pattern"]),
    ({"type": "object", "patternProperties": {".*": {}, "^a": {"type": "string"}}}, ["patternProperties"]),
    ({"properties": {"a": {"$ref": "https://example.com/a.json"}}}, ["$ref to another document"]),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a", "minProperties": 1}}}}},
        ["words beside $ref"],
    ),
]
USABLE = [
    {},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": ["x"]}}},
    {"type": "object", "properties": {"not": {"type": "string"}, "oneOf": {"const": {"not": 1}}}},  # names and data
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},  # at most one of them can hold
]
MALFORMED = [{"type": "oops"}, {"pattern": "("}, {"$ref": "#/nothing"}, {"properties": 3}]


@pytest.mark.parametrize(("schema", "words"), RELAXED, ids=[words[0] for _, words in RELAXED])
def test_a_schema_that_cannot_be_enforced_is_relaxed_unless_it_is_strict(schema, words):
    usable = fitted(schema, strict=False)
    assert list(usable.relaxed) == words
    assert fitted(usable.schema, strict=True).relaxed == ()
    with pytest.raises(GrammarError, match=re.escape(f"{words[0]} cannot be enforced")):
        fitted(schema, strict=True)


LARGE = [
    ({"properties": {f"k{i}": {"type": "null"} for i in range(3001)}}, "3,001 properties"),
    ({"anyOf": [{"properties": {f"k{i}": {} for i in range(2000)}} for _ in range(3)]}, "all objects 6,000"),
    ({"enum": ["x" * 1_000_000]}, "more than 1,000,000"),
    ({"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(4)]} for i in range(9)]}, "schema too large"),
]


@pytest.mark.parametrize(("schema", "message"), LARGE, ids=[message for _, message in LARGE])
def test_a_schema_that_would_take_too_long_is_refused(schema, message):
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    response = ask("/v1/completions", {**COMPLETION, "response_format": form})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "response_format"


def test_a_heavy_grammar_delays_neither_free_requests_nor_other_grammars(monkeypatch):
    heavy, begun, release = Grammar(kind="regex", source="heavy"), threading.Event(), threading.Event()
    compile_grammar, compiled = GrammarCompiler._compile, []

    def held(self, grammar):
        compiled.append(grammar)
        if grammar == heavy:
            begun.set()
            assert release.wait(60)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", held)

    async def scenario(client, _):
        wants = [{**COMPLETION, "guided_regex": "heavy"}] * 2
        waiting = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in wants[:1]]
        await asyncio.to_thread(begun.wait, 60)
        others = [
            await client.post("/v1/completions", json=body) for body in (COMPLETION, {**COMPLETION, "guided_regex": "light"})
        ]
        waiting += [asyncio.create_task(client.post("/v1/completions", json=body)) for body in wants[1:]]
        assert not waiting[0].done()
        release.set()
        return others, await asyncio.gather(*waiting)

    (free, light), answers = with_server(scenario)
    assert free.status_code == 200
    assert text_of(light) == "light"
    assert [text_of(answer) for answer in answers] == ["heavy"] * 2
    assert compiled.count(heavy) == 1, "both requests share it"


def test_a_grammar_that_cannot_be_used_is_tried_once(monkeypatch):
    compile_grammar, tried = GrammarCompiler._compile, []

    def counted(self, grammar):
        tried.append(grammar)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", counted)
    body = {**COMPLETION, "guided_regex": "(once"}
    messages = {ask("/v1/completions", body).json()["error"]["message"] for _ in range(2)}
    assert len(messages) == len(tried) == 1


@pytest.mark.parametrize("schema", USABLE, ids=str)
def test_a_schema_that_can_be_enforced_is_left_as_it_is(schema):
    assert fitted(schema, strict=True).schema == schema


@pytest.mark.parametrize("schema", MALFORMED, ids=str)
def test_a_malformed_schema_is_refused_even_if_it_is_not_strict(schema):
    with pytest.raises(GrammarError, match="the json schema cannot be used"):
        fitted(schema, strict=False)


def test_the_answer_says_what_of_a_schema_is_not_enforced():
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    response = ask("/v1/completions", {**COMPLETION, "response_format": form})
    assert set(json.loads(text_of(response))) <= {1, 2}
    assert response.headers[HEADER] == "uniqueItems"
    streamed = ask("/v1/completions", {**COMPLETION, "response_format": form, "stream": True})
    assert streamed.headers[HEADER] == "uniqueItems"
    form["json_schema"]["strict"] = True
    error = ask("/v1/completions", {**COMPLETION, "response_format": form}).json()["error"]
    assert error["param"] == "response_format"
    assert "strict is true, and uniqueItems cannot be enforced" in error["message"]
    exact = {"type": "json_schema", "json_schema": {"schema": {"enum": ["a"]}}}
    assert HEADER not in ask("/v1/completions", {**COMPLETION, "response_format": exact}).headers


# Tools


class City(pydantic.BaseModel):
    """Where."""

    name: str = pydantic.Field(pattern="^[a-z]{2}$")


class Weather(pydantic.BaseModel):
    """The weather."""

    city: City


def function(name="f", **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def calls_of(body):
    response = ask("/v1/chat/completions", {**CHAT, "tool_choice": "required", **body})
    assert response.status_code == 200, response.text
    return response, response.json()["choices"][0]["message"]


def test_a_model_of_pydantic_is_a_tool_that_can_be_required():
    tools = [openai.pydantic_function_tool(Weather)]
    assert "$defs" in tools[0]["function"]["parameters"]
    for choice in ("required", {"type": "function", "function": {"name": "Weather"}}):
        _, message = calls_of({"tools": tools, "tool_choice": choice, "parallel_tool_calls": False})
        (call,) = message["tool_calls"]
        assert Weather.model_validate_json(call["function"]["arguments"])


@pytest.mark.parametrize("fields", [{}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}], ids=str)
def test_a_function_without_parameters_gets_no_arguments(fields):
    _, message = calls_of({"tools": [function(**fields)], "parallel_tool_calls": False})
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{}]


def test_the_arguments_of_a_required_call_are_those_that_the_function_describes():
    text, number = {"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 0, "maximum": 9}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"c": text, "n": number}, "required": ["c"]}}
    forced = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "j", "schema": {"type": "object"}},
    }  # of a text, if there were any
    for seed in range(4):
        body = {**CHAT, **forced, "max_tokens": 100, "seed": seed, "response_format": schema, "parallel_tool_calls": False}
        (call,) = ask("/v1/chat/completions", body).json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]).keys() <= {"c", "n"}


A, B = {"properties": {"a": {}}}, {"properties": {"b": {}}}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, {**A, "additionalProperties": False}),
        ({"items": A}, {"items": {**A, "additionalProperties": False}}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [{**A, "additionalProperties": False}, {"type": "null"}]}),
        (
            {"properties": {"default": A}},  # the name of a property, not a word of the schema
            {"properties": {"default": {**A, "additionalProperties": False}}, "additionalProperties": False},
        ),
        ({**A, "additionalProperties": {"type": "string"}}, None),
        ({**A, "patternProperties": {"^x": {}}}, None),
        ({**A, "required": ["b"]}, None),
        ({**A, "anyOf": [B]}, None),
        ({"allOf": [A, B]}, None),
        ({"type": "object"}, None),
        ({"default": A}, None),
    ],
)
def test_objects_are_closed_where_nothing_else_says_what_they_may_contain(schema, expected):
    assert closed(schema) == (expected or schema)


def test_several_calls_are_possible_unless_they_are_forbidden():
    # The bias makes the model begin another call instead of ending the answer.
    body = {"tools": [function()], "logit_bias": {"2": -100}, "max_tokens": 110}
    _, message = calls_of(body)
    assert len(message["tool_calls"]) > 1
    assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
    _, message = calls_of({**body, "parallel_tool_calls": False})
    assert len(message["tool_calls"]) == 1


@pytest.mark.parametrize("max_tokens", [5, 30, 42])
def test_a_required_call_that_is_cut_off_is_no_content(max_tokens):
    tools = [function(parameters={"type": "object", "properties": {"abc": {"const": "xyz"}}, "required": ["abc"]})]
    response, message = calls_of({"tools": tools, "max_tokens": max_tokens})
    assert not message["content"]
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_a_strict_tool_is_refused_and_another_relaxed_for_words_that_cannot_be_enforced():
    parameters = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "not": {"required": ["b"]}}
    response, _ = calls_of({"tools": [function(parameters=parameters)]})
    assert response.headers[HEADER] == "not"
    strict = {**CHAT, "tool_choice": "required", "tools": [function(parameters=parameters, strict=True)]}
    error = ask("/v1/chat/completions", strict).json()["error"]
    assert error["param"] == "tools"
    assert "tools[0].function.parameters: strict is true, and not cannot be enforced" in error["message"]
    assert ask("/v1/chat/completions", {**strict, "tool_choice": "auto", "max_tokens": 1}).status_code == 200


# Other grammars

CALL = {"begin": "<f>", "schema": {"enum": [12]}, "end": "</f>"}
DIGITS = "start: DIGIT DIGIT\nDIGIT: /[0-9]/"
GBNF = 'root ::= [0-9] [0-9] "!"'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["yes", 'n"o']}, 'yes|n"o'),
        ({"guided_grammar": DIGITS}, "[0-9]{2}"),
        ({"guided_grammar": GBNF}, "[0-9]{2}!"),
        ({"guided_json": {"enum": ["a"]}}, '"a"'),
        (
            {"guided_json": '{"enum": [["a", 1]]}', "guided_whitespace_pattern": "  "},
            r'\[( {2})?"a"( {2})?,( {2})?1( {2})?\]',
        ),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": DIGITS}}, "[0-9]{2}"),
        ({"structured_outputs": {"json": {"enum": [[1, 2]]}, "disable_any_whitespace": True}}, r"\[1,2\]"),
        ({"response_format": {"type": "regex", "regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"response_format": {"type": "choice", "choice": ["yes", "no"]}}, "yes|no"),
        ({"response_format": {"type": "grammar", "grammar": DIGITS}}, "[0-9]{2}"),
    ],
    ids=str,
)
def test_every_field_that_demands_a_grammar_is_followed(fields, expected):
    assert re.fullmatch(expected, text_of(ask("/v1/completions", {**COMPLETION, **fields})))


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag", "structures": [CALL], "triggers": ["<f"]}},
        {"structural_tag": json.dumps({"structures": [CALL], "triggers": ["<f"]})},
        {"structured_outputs": {"structural_tag": json.dumps({"structures": [CALL], "triggers": ["<f"]})}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_tag_in_free_text_holds_what_follows_to_its_schema(fields):
    bias = {str(3 + i): 0 for i in range(3)}
    free = text_of(ask("/v1/completions", {**COMPLETION, "logit_bias": bias, **fields}))
    assert len(free) > 20  # any text is allowed
    # "<" is the most likely token everywhere, then "f": the trigger.
    from tests.serving.tiny_server import tokenizer

    first, second = tokenizer().encode("<f", add_special_tokens=False)
    forced = {**COMPLETION, "temperature": 0, "logit_bias": {str(first): 60, str(second): 59}, "frequency_penalty": 2.0}
    text = text_of(ask("/v1/completions", {**forced, **fields}))
    assert "<f" in text
    assert all(part.startswith(">12</f>") for part in text.split("<f")[1:-1])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "("}, "guided_regex", "the regex cannot be used"),
        ({"guided_grammar": "start: oops"}, "guided_grammar", "the grammar cannot be used"),
        ({"guided_grammar": "nonsense"}, "guided_grammar", "the grammar cannot be used"),
        ({"guided_json": "[1]"}, "guided_json", "is not a JSON object"),
        ({"structural_tag": "{}"}, "structural_tag", "must be JSON with structures"),
        ({"structured_outputs": {"json": {"type": "oops"}}}, "structured_outputs.json", "cannot be used"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "several grammars"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "several grammars"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"response_format": {"type": "regex"}}, "response_format", "regex and type 'regex' belong together"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_an_error_that_names_its_field(fields, param, message):
    error = ask("/v1/completions", {**COMPLETION, **fields}).json()["error"]
    assert message in error["message"]
    assert error["param"] == param


def test_streams_follow_grammars_too():
    got = events(ask("/v1/chat/completions", {**CHAT, "guided_choice": ["alpha", "beta"], "stream": True}))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in got) in ("alpha", "beta")
