"""Chat templates: rendering a conversation as the prompt format that a model was trained on.

The environment is that of transformers' `apply_chat_template`, for which templates are written.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.messages import checked_messages, instructions, short, versions

if TYPE_CHECKING:
    import jinja2
    from jinja2.parser import Parser


def render_chat(
    templates: Mapping[str, str],
    messages: Sequence[JsonFields],
    *,
    add_generation_prompt: bool,
    tools: Sequence[JsonFields] | None,
    named_tokens: Mapping[str, str],
    extra: Mapping[str, object],
) -> str:
    """Returns the rendered prompt; see `Tokenizer.apply_chat_template`. With tools, a "tool_use" template takes precedence.

    A template may accept several versions of a conversation. The first one it renders without losing a developer's
    instructions is used.
    """
    import jinja2

    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ValueError(
            "this tokenizer has no chat template"
            + (f" named 'default', only {sorted(templates)}" if templates else "")
            + "; it belongs to a base model: pass a plain prompt, or use an instruction-tuned checkpoint"
        )
    checked = checked_messages(messages)
    variables = {
        **named_tokens,
        "documents": None,
        **extra,
        "tools": _checked_tools(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    required = instructions(checked)
    rendered, refusal = None, None
    for version in versions(checked, templates[name]):
        try:
            text = _compiled(templates[name]).render({**variables, "messages": version})
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template {name!r} does not parse, line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program: any exception means that it refuses this conversation
            refusal = refusal or error
            continue
        if all(instruction in text for instruction in required):
            return text
        rendered = rendered or text
    if rendered is not None:
        return rendered
    raise ValueError(f"the chat template {name!r} refuses this conversation: {refusal or 'it renders nothing'}") from refusal


def _checked_tools(tools: Sequence[JsonFields] | None) -> list[JsonFields] | None:
    if not tools:
        return None
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of JSON schemas (dicts), got {short(tools)}")
    return [dict(tool) for tool in tools]


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> jinja2.Environment:
    """Sandboxed, because a template is a program from a downloaded checkpoint."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training masks; here only its body matters."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # jinja2's filter escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment
