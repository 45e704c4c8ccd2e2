"""The formats of tool calls: any split of an answer gives the same pieces, and forced calls are read again."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.serving.chat import AnswerForm
from fastgen_jax.serving.reasoning import FORMATS as REASONING
from fastgen_jax.serving.tool_formats import FORMATS, tool_format
from fastgen_jax.text.grammar import GrammarCompiler
from tests.serving.tiny_server import tokenizer

SCHEMAS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
    "now": {"type": "object", "properties": {}},
}
PARIS, ROME = {"city": "Paris", "days": 2}, {"city": 'Rome "é"\n{x}', "exact": True, "tags": ["a", "b"]}
TWO = [("get_weather", PARIS), ("get_weather", ROME)]

CALL, END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def written(arguments):
    return json.dumps(arguments, ensure_ascii=False)


ANSWERS = {
    "hermes": (
        "Let me look.\n<tool_call>\n"
        + "\n</tool_call>\n<tool_call>\n".join(f'{{"name": "{n}", "arguments": {written(a)}}}' for n, a in TWO)
        + "\n</tool_call>\n",
        "Let me look.\n",
        TWO,
    ),
    "hermes, keys in another order": (
        f'<tool_call>{{"arguments": {written(PARIS)}, "name": "get_weather"}}</tool_call>',
        "",
        TWO[:1],
    ),
    "hermes, no arguments": ('<tool_call>{"name": "now"}</tool_call> done', " done", [("now", {})]),
    "llama": (
        "; ".join(f'{{"name": "{n}", "parameters": {written(a)}}}' for n, a in TWO),
        "",
        TWO,
    ),
    "llama, with a tag": ('<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', "", [("now", {})]),
    "llama, an answer in JSON": ('{"city": "Paris"}', '{"city": "Paris"}', []),
    "llama, text": ('It is {"name": 1}', 'It is {"name": 1}', []),
    "pythonic": (
        '[get_weather(city="Paris", days=2), get_weather(city=\'Rome "é"\\n{x}\', exact=True, tags=["a", "b"])]',
        "",
        TWO,
    ),
    "pythonic, no arguments": ("[now()]", "", [("now", {})]),
    "pythonic, a list": ("[1, 2, 3]", "[1, 2, 3]", []),
    "pythonic, text": ("Call [now()]", "Call [now()]", []),
    "mistral": (
        "Sure.[TOOL_CALLS] [" + ", ".join(f'{{"name": "{n}", "arguments": {written(a)}}}' for n, a in TWO) + "]",
        "Sure.",
        TWO,
    ),
    "mistral-v11": ("".join(f"[TOOL_CALLS]{n}[ARGS]{written(a)}" for n, a in TWO), "", TWO),
    "mistral-v11, with an id": (f"Hm[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{written(PARIS)}", "Hm", TWO[:1]),
    "qwen3-coder": (
        "I call.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"
        'Rome "é"\n{x}\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n'
        "</function>\n</tool_call>",
        "I call.\n",
        TWO,
    ),
    "qwen3-coder, no arguments": ("<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [("now", {})]),
    "qwen3-coder, not a call": ("<tool_call>x</tool_call> y", "<tool_call>x</tool_call> y", []),
    "glm": (
        "OK<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        '<arg_value>Rome "é"\n{x}</arg_value>\n<arg_key>exact</arg_key>\n<arg_value>true</arg_value>\n'
        '<arg_key>tags</arg_key>\n<arg_value>["a", "b"]</arg_value>\n</tool_call>',
        "OK",
        TWO,
    ),
    "glm, no arguments": ("<tool_call>now\n</tool_call>", "", [("now", {})]),
    "glm, not a call": ("<tool_call>what is it?</tool_call>", "<tool_call>what is it?</tool_call>", []),
    "deepseek-v3": (
        "Yes."
        + CALLS
        + "\n".join(f"{CALL}function{SEPARATOR}{n}\n```json\n{written(a)}\n```{END}" for n, a in TWO)
        + END_CALLS,
        "Yes.",
        TWO,
    ),
    "deepseek-v3.1": (CALLS + "".join(f"{CALL}{n}{SEPARATOR}{written(a)}{END}" for n, a in TWO) + END_CALLS, "", TWO),
    "harmony": (
        "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        + "<|call|>".join(
            f"<|start|>assistant<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{written(a)}"
            for n, a in TWO
        ),
        "Wait.",
        TWO,
    ),
    "harmony, the recipient first": (
        f" to=functions.get_weather<|channel|>commentary json<|message|>{written(PARIS)}<|call|>",
        "",
        TWO[:1],
    ),
    "harmony, an answer": ("<|channel|>final<|message|>Hello to=you", "Hello to=you", []),
    "harmony, plain text": ("Hello <b>", "Hello <b>", []),
}


def form_of(name, reasoning=None, *, opened=False):
    return AnswerForm(schemas=SCHEMAS, tools=FORMATS.get(name), reasoning=REASONING.get(reasoning), opened=opened)


def read(form, pieces):
    """The content, the reasoning and the calls (name, text of the arguments) of an answer that arrives in pieces."""
    reader = form.reader()
    texts, calls = {"content": "", "reasoning": ""}, []
    for piece in [p for text in pieces for p in reader.push(text)] + reader.flush():
        if piece.kind == "call":
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            calls[-1][1] += piece.text
        else:
            texts[piece.kind] += piece.text
    assert reader.num_calls == len(calls)
    return texts["content"], texts["reasoning"], calls


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_read_from_an_answer_that_comes_at_once_or_by_the_character(name):
    text, content, calls = ANSWERS[name]
    form = form_of(name.partition(",")[0])
    whole = read(form, [text])
    assert (whole[0], [(n, json.loads(a)) for n, a in whole[2]]) == (content, calls)
    assert read(form, text) == whole


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(ANSWERS)), st.data())
def test_any_split_of_an_answer_gives_the_same_pieces(name, data):
    text = ANSWERS[name][0]
    length = data.draw(st.integers(0, len(text)), "length")  # a limit may cut off the answer
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=8), "cuts"))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    form = form_of(name.partition(",")[0])
    assert read(form, pieces) == read(form, [text[:length]])


MARKS = (
    *("<tool_call>", "</tool_call>", "<function=now>", "</function>", "<parameter=x>", "</parameter>", "[TOOL_CALLS]"),
    *("[ARGS]", '{"name": "now", "arguments": ', "{}", "}", "{", '"', "[", "now(", "x=1", ")", ",", CALL, SEPARATOR, END),
    *("<|channel|>", "<|message|>", " to=functions.now", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("a", "\n", " ", "\\"),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(MARKS), max_size=12))
def test_no_text_breaks_a_reader(name, parts):
    form = form_of(name)
    assert read(form, parts) == read(form, ["".join(parts)])


@pytest.mark.parametrize("name", ["hermes", "qwen3-coder", "glm", "deepseek-v3.1", "mistral-v11", "harmony"])
def test_arguments_are_returned_before_the_call_is_complete(name):
    text = ANSWERS[name][0]
    text = text[: text.index("Paris") + 3]
    _, _, ((function, arguments),) = read(form_of(name), text)
    assert function == "get_weather"
    assert arguments.endswith('"city": "Par')


def test_only_the_first_call_is_returned_if_calls_may_not_be_parallel():
    form = AnswerForm(schemas=SCHEMAS, tools=FORMATS["hermes"], reasoning=None, several=False)
    assert [name for name, _ in read(form, [ANSWERS["hermes"][0]])[2]] == ["get_weather"]


@pytest.mark.parametrize(
    ("text", "opened", "want"),
    [
        ("<think>\nSo.\n</think>\n\nHi", False, ("Hi", "So.")),
        ("\n<think>So.</think>Hi <think>", False, ("Hi <think>", "So.")),
        ("So.\n</think>\n\nHi", True, ("Hi", "So.")),
        ("So. And", True, ("", "So. And")),
        ("Hi </think>", False, ("Hi </think>", "")),
        ("<think>", False, ("", "")),
        ("<th", False, ("<th", "")),
        ("", True, ("", "")),
    ],
)
def test_reasoning_is_separated_from_the_content(text, opened, want):
    form = form_of(None, "think", opened=opened)
    assert read(form, [text])[:2] == read(form, text)[:2] == want


def test_calls_follow_reasoning():
    text = f"<think>\nHm.\n</think>\n\n{ANSWERS['hermes'][0]}"
    content, thoughts, calls = read(form_of("hermes", "think"), text)
    assert (content, thoughts, len(calls)) == ("Let me look.\n", "Hm.", 2)
    assert read(form_of("harmony", "harmony"), ANSWERS["harmony"][0])[1] == "I think."


MARKED = {"hermes": ("<tool_call>", "</tool_call>"), "mistral": ("[TOOL_CALLS]",), "harmony": FORMATS["harmony"].marks}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("special", [False, True])
def test_marks_that_are_tokens_are_forced_as_such(name, special):
    marks = MARKED[name]
    known = tokenizer()
    first = known.vocab_size

    def encode(text, *, add_special_tokens):
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text)
        ids = [[first + marks.index(p)] if p in marks else known.encoder(p, add_special_tokens=False) for p in pieces]
        return [i for part in ids for i in part]

    marked = replace(
        known,
        encoder=encode,
        texts=[*known.texts, *marks],
        pieces=[*known.pieces, *(mark.encode() for mark in marks)],
        special_ids=known.special_ids | (set(range(first, first + len(marks))) if special else set()),
    )
    form = FORMATS[name]
    schemas = {"f": {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}}
    compiler = GrammarCompiler(marked, vocab_size=marked.vocab_size, eos_token_ids=(2,))
    matcher = compiler.matcher(form.grammar(schemas, marked, several=True))
    words, ids = np.zeros(-(-marked.vocab_size // 32), np.int32), []
    while len(ids) < 200:
        words[:] = 0
        matcher.fill_mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        ids.append(2 if 2 in allowed else int(allowed[-1]))
        if matcher.advance(ids[-1]):
            break
    assert matcher.error is None
    text = marked.decode([i for i in ids if i != 2], skip_special_tokens=False)
    assert [(n, json.loads(a)) for n, a in read(form_of(name), text)[2]] == [("f", {"x": 1})]
    used = [mark for mark in marks if mark in text]
    assert used
    assert {first + marks.index(mark) for mark in used} <= set(ids)


TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}",
    "qwen3-coder": "<tool_call>\n<function=example>\n<parameter=a>",
    "glm": "<tool_call>{f}\n<arg_key>{k}</arg_key>\n<arg_value>",
    "mistral": "{{ '[TOOL_CALLS] [' }}",
    "mistral-v11": "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "deepseek-v3": CALL + "function" + SEPARATOR + "```json",
    "deepseek-v3.1": CALL + SEPARATOR,
    "harmony": "<|start|>assistant<|channel|>analysis<|message|>",
    "llama": '<|start_header_id|>{\'{"name": "\' + n + \'", "parameters": \'}',
    "pythonic": "<|start_header_id|>[func_name1(params_name1=params_value1)]",
    None: "{{ tools }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_chooses_the_format(name):
    found = tool_format(None, TEMPLATES[name])
    assert (found.name if found else None) == name
