"""Small chat templates in the styles of published ones, and conversations to render with them.

`TEMPLATES` lists each with the conversations that `make_text.py` renders; `tests/text/test_transformers.py` renders further
forms of the same conversations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SYSTEM = {"role": "system", "content": "Be <brief> & kind."}
USER = {"role": "user", "content": "Grüße, what's the weather?"}
ANSWER = {"role": "assistant", "content": "Cold.\n"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <eine> Stadt",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}},
}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefgh1", "content": '{"celsius": -4}'}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "Add the two."}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "turns": {"messages": [SYSTEM, USER, ANSWER, USER]},
    "tools": {"messages": [SYSTEM, USER, CALLS, RESULT], "tools": [WEATHER]},
    "reasoning": {"messages": [USER, THOUGHT, USER]},
    "extra": {"messages": [USER], "extra": {"enable_thinking": False}},
    "documents": {"messages": [USER], "extra": {"documents": [{"title": "A", "text": "b"}]}},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]},
}

# What each uses besides roles and texts, and its conversations.
_USED: dict[str, tuple[str, ...]] = {
    # Roles in marks; trimmed blocks.
    "chatml": ("one", "system", "turns"),
    # A date, trim, slices of messages, tojson with an indent, calls whose arguments are an object, one call only.
    "llama3": ("one", "system", "turns", "tools"),
    # A namespace, a filter of messages, strict alternation, whole functions as JSON.
    "mistral": ("one", "system", "turns", "tools"),
    # Reasoning under its usual name, reversed messages, text methods, a generation mark, continue.
    "qwen3": ("one", "turns", "tools", "reasoning", "extra"),
    # Arguments that are already JSON, joined with text; a test for null content.
    "deepseek": ("one", "system", "turns"),
    # Parts of a content, in a macro, beside text.
    "parts": ("one", "turns", "parts"),
    # Parts of a content only.
    "only_parts": ("parts",),
    # Documents.
    "rag": ("one", "documents"),
}
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    name: ((Path(__file__).with_name("chat_templates") / f"{name}.jinja").read_text(encoding="utf-8"), conversations)
    for name, conversations in _USED.items()
}
