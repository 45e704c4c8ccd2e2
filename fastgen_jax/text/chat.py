"""Chat templates: a conversation as the prompt that a model was trained on.

The environment is that of transformers' `apply_chat_template`, which template authors write for.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fastgen_jax.text.messages import checked_messages, instructions, short, versions

if TYPE_CHECKING:
    import jinja2


def render_chat(
    templates: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    named_tokens: Mapping[str, str],
    extra: Mapping[str, Any],
) -> str:
    """The rendered prompt; see `Tokenizer.apply_chat_template`. A "tool_use" template serves if tools are given.

    Of the versions of a conversation that a template may take, the first counts that it takes without losing what a
    developer says.
    """
    import jinja2

    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ValueError(
            "this tokenizer has no chat template"
            + (f" named 'default', only {sorted(templates)}" if templates else "")
            + "; it belongs to a base model: pass a plain prompt, or an instruction-tuned checkpoint"
        )
    checked = checked_messages(messages)
    variables = {
        **named_tokens,
        "documents": None,
        **extra,
        "tools": _checked_tools(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    wanted = instructions(checked)
    rendered, refusal = None, None
    for version in versions(checked, templates[name]):
        try:
            text = _compiled(templates[name]).render({**variables, "messages": version})
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template {name!r} does not parse, line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program: whatever it raises is its answer to this conversation
            refusal = refusal or error
            continue
        if all(instruction in text for instruction in wanted):
            return text
        rendered = rendered or text
    if rendered is not None:
        return rendered
    raise ValueError(f"the chat template {name!r} refuses this conversation: {refusal or 'it gives no text'}") from refusal


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
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
    """Sandboxed, because a template comes with a downloaded checkpoint and is a program."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training masks; here its body is all that counts."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment
