"""What a format of tool calls consists of, and the grammar of calls that a model must write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from fastgen_jax.json_types import JsonFields
from fastgen_jax.serving.tool_formats.pieces import Parser, Schemas
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import JSON_LAYOUT, Grammar


class Rules:
    """The rules of a grammar in llguidance's variant of Lark, and the expressions from which they are made."""

    def __init__(self, tokenizer: Tokenizer, marks: tuple[str, ...]) -> None:
        self._rules: list[str] = []
        self._tokens: dict[str, str] = {}
        for mark in marks:
            ids = tokenizer.encode(mark, add_special_tokens=False)
            if len(ids) == 1 and tokenizer.pieces[ids[0]].decode(errors="replace") == mark:
                self._tokens[mark] = f"<[{ids[0]}]>"
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self._tokens, key=len, reverse=True)))})")

    def text(self, text: str) -> str:
        """Exactly this text; marks of the format that are one token of the model become that token."""
        parts = self._split.split(text) if self._tokens else [text]
        return " ".join(self._tokens.get(part) or json.dumps(part, ensure_ascii=False) for part in parts if part)

    def json(self, schema: JsonFields) -> str:
        """JSON that follows a schema."""
        return self._named(f"%json {json.dumps({'x-guidance': JSON_LAYOUT, **schema}, ensure_ascii=False)}")

    def free(self, end: str) -> str:
        """Any text up to the first `end`, which is included and contains no mark."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}[suffix={json.dumps(end, ensure_ascii=False)}]: /(?s:.*)/")
        return name

    def grammar(self, start: str) -> Grammar:
        """The grammar of texts that follow the expression `start`."""
        return Grammar(kind="lark", source="\n".join([f"start: {start}", *self._rules]))

    def _named(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls of functions."""

    name: str
    """As in `--tool-format`."""
    recognizes: Callable[[str], bool]
    """Whether a chat template belongs to such a model."""
    read: Parser
    """Splits an answer, after its reasoning, into content and calls."""
    write: Callable[[Rules, str, JsonFields], str]
    """The expression of one call of the function with that name and that schema of its parameters."""
    marks: tuple[str, ...] = ()
    """Its fixed texts that are tokens of the models; special ones among them are shown in the text."""
    around: tuple[str, str] = ("", "")
    """What is written before the first call and after the last."""
    between: str = "\n"
    """What is written between two calls."""
    id_length: int = 24
    """Length of the ids of calls; templates of Mistral accept only nine letters and digits."""
    channels: bool = False
    """Whether the format has parts for reasoning and for the user, in every answer; `read` separates them too."""

    def grammar(self, schemas: Schemas, tokenizer: Tokenizer, *, several: bool) -> Grammar:
        """The grammar of answers with one call, or with one or more."""
        rules = Rules(tokenizer, self.marks)
        calls = [self.write(rules, name, schema) for name, schema in schemas.items()]
        call = f"({' | '.join(calls)})"
        more = f"({rules.text(self.between) if self.between else ''} {call})*" if several else ""
        before, after = (rules.text(text) if text else "" for text in self.around)
        return rules.grammar(f"{before} {call} {more} {after}")
