"""The lines of a batch's input: valid ones are sent, invalid ones cost one error each."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.serving.batch_input import BatchInput
from tests.serving.batches import GOOD, Echo, answers, line, run
from tests.serving.tiny_server import MODEL

BAD_LINES = {
    "NaN": (b'{"custom_id": "bad", "prompt": "x", "temperature": NaN}', "NaN' is not a number in JSON", "bad"),
    "Infinity": (b'{"custom_id": "bad", "prompt": "x", "a": [-Infinity]}', "-Infinity' is not a number in JSON", "bad"),
    "a number too large for a float": (b'{"custom_id": "bad", "prompt": "x", "a": 1e999}', "'1e999' is not a number", "bad"),
    "an integer of 5000 digits": (b'{"custom_id": "bad", "a": ' + b"1" * 5000 + b"}", "cannot be read", "bad"),
    "not UTF-8": (b'{"custom_id": "bad", "prompt": "caf\xe9"}', "not UTF-8 (byte 0xe9 at", "bad"),
    "not UTF-8 in the id": (b'{"custom_id": "b\xe9d", "prompt": "x"}', "not UTF-8", "b\ufffdd"),
    "cut off": (b'{"custom_id": "bad", "method": "POST", "url": "/v1/comp', "not JSON", "bad"),
    "plain text": (b"Once upon a time", "not JSON", "1"),
    "deep": (
        b'{"custom_id": "bad", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nests objects or lists too deeply",
        "bad",
    ),
    "a list": (b"[1, 2, 3]", "the line is a list", "1"),
    "null": (b"null", "the line is null", "1"),
    "a number": (b"42", "the line is a number", "1"),
    "true": (b"true", "the line is true or false", "1"),
    "an id that is a number": (line(custom_id=7), "custom_id is 7; it must be a string", 7),
    "an id that is an object": (line(custom_id={"a": [1]}), "custom_id is an object", "1"),
    "no url": (json.dumps({"custom_id": "bad", "body": {"prompt": "x"}}).encode(), "url is missing", "bad"),
    "another url": (line(custom_id="bad", url=["/v1/embeddings"]), "url is a list; choose one of", "bad"),
    "another method": (line(custom_id="bad", method="GET"), "method is 'GET'", "bad"),
    "a body that is text": (line(custom_id="bad", body="{}"), "body is a string", "bad"),
    "a stream": (line(custom_id="bad", body={"prompt": "x", "stream": True}), "stream=true", "bad"),
    "a repeated id": (line(), "custom_id 'good' is already used by batch-0", "good"),
    "an empty object": (b"{}", "this one has nothing", "1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_an_invalid_line_costs_one_error_and_no_other_line(tmp_path, name):
    raw, message, custom_id = BAD_LINES[name]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line() + b"\n" + raw + b"\n" + line(custom_id="last"))
    echo = Echo()
    result = run(source, target, echo)
    got = answers(target)
    assert sorted(got) == [0, 1, 2]
    assert got[1]["response"] is None
    assert message in got[1]["error"]["message"]
    assert got[1]["custom_id"] == custom_id
    assert len(echo.bodies) == 2
    assert (result.total, result.answered, result.failed) == (3, 3, 1)
    assert message in result.failures[0]


def test_byte_order_marks_and_windows_line_ends_are_not_part_of_a_line(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bom = b"\xef\xbb\xbf"
    source.write_bytes(bom + line() + b"\r\n\r\n  \r\n" + bom + line(custom_id="last"))  # two files in one
    echo = Echo()
    assert run(source, target, echo).failed == 0
    assert {number: answer["custom_id"] for number, answer in answers(target).items()} == {0: "good", 3: "last"}
    assert echo.bodies == [GOOD["body"]] * 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(bom + b"one\r\n\r\n two \r\nthree")
    echo = Echo()
    run(prompts, tmp_path / "answers.jsonl", echo)
    assert sorted(body["prompt"] for body in echo.bodies) == [" two ", "one", "three"]


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.jsonl", b"Once", "jsonl"),
        ("a.NDJSON", b"Once", "jsonl"),
        ("a.json", b"Once", "jsonl"),
        ("a.txt", b'"Once"', "text"),
        ("a.txt", b"{this} is a prompt\n{}", "text"),
        ("a", b"\n\xef\xbb\xbf {\nOnce", "jsonl"),
        ("a.in", b"Once\n{}", "text"),
        ("a", b"", "text"),
    ],
)
def test_the_format_follows_from_the_name_or_the_first_line(tmp_path, name, content, form):
    path = tmp_path / name
    path.write_bytes(content)
    assert BatchInput(path).form == form
    assert BatchInput(path, form="text").form == "text"


def test_every_line_of_a_file_has_the_same_format(tmp_path):
    lines = ["null", '{"prompt": "x"}', "42", '"quoted"', "{}"]
    source = tmp_path / "in"
    source.write_text("\n".join(lines))
    echo = Echo()
    assert run(source, tmp_path / "text.jsonl", echo).failed == 0
    assert sorted(body["prompt"] for body in echo.bodies) == sorted(lines)
    assert run(source, tmp_path / "jsonl.jsonl", form="jsonl").failed == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "not text in UTF-8"),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16-be"), "not text in UTF-8"),
        ("a.jsonl", b"\x1f\x8b\x08rest", "is compressed; unpack it first"),
        ("a.json", b'[\n{"prompt": "x"}\n]\n', "is a single JSON list"),
        ("a.txt", b'{"prompt": "x"}', "pass --format jsonl, or --format text"),
    ],
)
def test_a_file_that_is_not_lines_of_text_is_refused(tmp_path, name, content, message):
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(source, target)
    assert not target.exists()


def test_an_overlong_line_is_not_read_completely(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgen_jax.serving.batch_input.MAX_LINE", 1000)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line() + b"\n" + b"x" * 1001 + b"\n" + b"x" * 1_000_000 + b"\n" + line(custom_id="last"))
    run(source, target)
    got = answers(target)
    assert {number: answer["error"] is None for number, answer in got.items()} == {0: True, 1: False, 2: False, 3: True}
    assert "the line is longer than" in got[2]["error"]["message"]


def test_an_empty_file_is_done_immediately(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"")
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").total == 0


def test_model_and_options_fill_only_what_a_body_leaves_out(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b"\n".join(
            [
                line(body={"prompt": "a"}),
                line(custom_id="2", body={"prompt": "b", "model": None, "seed": 9}),
                line(custom_id="3", body={"prompt": "c", "model": "other"}),
                b'{"prompt": "d", "max_tokens": 9}',
            ]
        )
    )
    echo = Echo()
    run(source, tmp_path / "out.jsonl", echo, options={"max_tokens": 1, "seed": 2})
    assert sorted(echo.bodies, key=lambda body: body["prompt"]) == [
        {"model": MODEL, "prompt": "a", "max_tokens": 1, "seed": 2},
        {"model": MODEL, "prompt": "b", "max_tokens": 1, "seed": 9},
        {"model": "other", "prompt": "c", "max_tokens": 1, "seed": 2},
        {"model": MODEL, "prompt": "d", "max_tokens": 9, "seed": 2},
    ]
