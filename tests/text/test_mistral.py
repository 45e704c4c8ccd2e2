"""Mistral's conversation formats beside mistral-common: `tests/reference/mistral.json`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from fastgen_jax.text import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference" / "mistral.json"
VERSIONS = ("v3", "v7", "v11", "v13", "v15")


@functools.cache
def _reference() -> dict[str, Any]:
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def _write(folder: Path, version: str) -> Path:
    known = version if version in VERSIONS else "v7"
    content = {**_reference()["v3"]["tekken"], **_reference()[known]["tekken"]}
    content["config"] = {**content["config"], "version": version}
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tekken_file_without_a_template_has_the_format_of_its_version(tmp_path, version):
    tokenizer = load_tokenizer(_write(tmp_path, version))
    for case in _reference()[version]["cases"]:
        request = dict(case["request"])
        messages = request.pop("messages")
        assert tokenizer.apply_chat_template(messages, **request) == case["text"], case["name"]
        assert tokenizer.encode_chat(messages, **request) == case["ids"], case["name"]


def test_a_template_beside_the_file_replaces_its_format_and_unknown_versions_have_none(tmp_path):
    user = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(_write(tmp_path, "v7")).apply_chat_template(user) == "<s>[INST]hi[/INST]"
    assert load_tokenizer(_write(tmp_path, "v99")).template() is None
    (tmp_path / "chat_template.jinja").write_text("own {{ messages[0].content }}")
    assert load_tokenizer(_write(tmp_path, "v7")).apply_chat_template(user) == "own hi"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_marked_in_versions_with_marks_for_it(tmp_path, name):
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", name: "Add."}]
    texts = {}
    for version in ("v11", "v13"):
        folder = tmp_path / version
        folder.mkdir()
        texts[version] = load_tokenizer(_write(folder, version)).apply_chat_template(messages)
    assert texts["v11"].endswith("[/INST]4</s>")
    assert texts["v13"].endswith("[/INST][THINK]Add.[/THINK]4</s>")


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        ({"role": "tool", "content": "4"}, "a tool message requires its tool_call_id"),
        ({"role": "critic", "content": "4"}, "roles are system, user, assistant and tool, not critic"),
    ],
)
def test_messages_that_the_format_cannot_express_are_refused(tmp_path, message, refusal):
    tokenizer = load_tokenizer(_write(tmp_path, "v7"))
    with pytest.raises(ValueError, match=rf"the format that .*tekken\.json names refuses this conversation: {refusal}"):
        tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2?"}, message])
