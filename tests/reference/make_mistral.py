"""Regenerates `mistral.json`: conversations as mistral-common encodes them, with a small vocabulary in each version.

python tests/reference/make_mistral.py      # needs mistral-common 1.13
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, SpecialTokens
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
NUM_SPECIAL = 40
WORDS = ["th", "he", "er", "in", " t", "the", " the", "ing", "ol", "tool", "na", "me"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für eine Stadt",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
BARE = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def call(arguments: str, id: str = "abcdefgh1") -> dict[str, Any]:
    """A call of the function "weather"."""
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def result(content: str, id: str = "abcdefgh1") -> dict[str, Any]:
    """What a call returned."""
    return {"role": "tool", "tool_call_id": id, "name": "weather", "content": content}


def said(role: str, content: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    """A content of several texts."""
    return [{"type": "text", "text": text} for text in texts]


ASKED = [said("user", "Is it cold in Köln?"), {"role": "assistant", "content": "", "tool_calls": [call('{"city": "Köln"}')]}]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [said("user", "Hello  the world")]},
    "system": {"messages": [said("system", "Be brief."), said("user", "Hello")]},
    "two turns": {
        "messages": [
            said("system", "Be brief."),
            said("user", "Hi"),
            said("assistant", "Hello!  "),
            said("user", "And now?\n"),
        ]
    },
    "users in a row": {
        "messages": [said("user", "one"), said("user", "two"), said("assistant", "x"), said("user", "three")]
    },
    "parts": {"messages": [said("system", parts("a", "b")), said("user", parts("one", "", "two"))]},
    "tools": {"messages": [said("user", "a"), said("assistant", "b"), said("user", "c")], "tools": [WEATHER, BARE]},
    "result": {"messages": [*ASKED, result("4 °C")], "tools": [WEATHER]},
    "json result": {"messages": [*ASKED, result('{"temperature": 4}')], "tools": [WEATHER]},
    "after a result": {
        "messages": [*ASKED, result("[1, 2]"), said("assistant", "Yes."), said("user", "Thanks")],
        "tools": [WEATHER],
    },
    "two calls": {
        "messages": [
            said("user", "Both?"),
            {"role": "assistant", "content": "", "tool_calls": [call("{}"), call('{"city": "B"}', "abcdefgh2")]},
            result("1x"),
            result("2x", "abcdefgh2"),
        ],
        "tools": [WEATHER],
    },
}
# From version 13 on, an assistant's reasoning is part of its content.
THOUGHT = {
    "messages": [
        said("user", "2 + 2?"),
        said("assistant", [{"type": "thinking", "thinking": "Add the two."}, {"type": "text", "text": "4"}]),
        said("user", "Sure?"),
    ]
}
EFFORT = {"messages": [said("user", "Hi")], "reasoning_effort": "high"}


def tekken(version: str) -> dict[str, Any]:
    """The content of a small tekken.json."""
    words = [bytes([byte]) for byte in range(256)] + sorted((word.encode() for word in WORDS), key=len)
    content: dict[str, Any] = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": NUM_SPECIAL + len(words),
            "default_num_special_tokens": NUM_SPECIAL,
            "version": version,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
    }
    if version not in ("v3", "v7"):
        content["special_tokens"] = [
            {"rank": rank, "token_str": token.value, "is_control": True} for rank, token in enumerate(SpecialTokens)
        ]
    if version == "v15":
        effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
        content["model_settings_builder"] = {"reasoning_effort": effort}
    return content


def main() -> None:
    """Writes the file beside this script."""
    found: dict[str, Any] = {}
    for version in ("v3", "v7", "v11", "v13", "v15"):
        content = tekken(version)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tekken.json"
            file.write_text(json.dumps(content))
            tokenizer = MistralTokenizer.from_file(str(file))
        given = dict(CONVERSATIONS)
        if version in ("v13", "v15"):
            given["thought"] = THOUGHT
        if version == "v15":
            given["effort"] = EFFORT
        cases = []
        for name, request in given.items():
            tokens = tokenizer.encode_chat_completion(ChatCompletionRequest(**request)).tokens
            text = tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
            cases.append({"name": name, "request": request, "text": text, "ids": tokens})
        found[version] = {"tekken": content if version == "v3" else without_vocab(content), "cases": cases}
    Path(__file__).with_name("mistral.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


def without_vocab(content: dict[str, Any]) -> dict[str, Any]:
    """The rest of a tekken.json: the vocabulary is the same in all versions."""
    return {name: value for name, value in content.items() if name != "vocab"}


if __name__ == "__main__":
    main()
