"""Chat templates: a conversation as the prompt that a model was trained on.

The environment is that of transformers' `apply_chat_template`, which template authors write for.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
    """The rendered prompt; see `Tokenizer.apply_chat_template`. A "tool_use" template serves if tools are given."""
    import jinja2

    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ValueError(
            "this tokenizer has no chat template"
            + (f" named 'default', only {sorted(templates)}" if templates else "")
            + "; it belongs to a base model: pass a plain prompt, or an instruction-tuned checkpoint"
        )
    variables = {**named_tokens, "documents": None, **extra, "messages": checked_messages(messages),
                 "tools": _checked_tools(tools), "add_generation_prompt": add_generation_prompt}
    try:
        return _compiled(templates[name]).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template {name!r} does not parse, line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RuntimeError) as error:
        raise ValueError(f"the chat template {name!r} refuses this conversation: {error}") from error


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the form that templates expect; ValueError names the malformed one and what is wrong.

    Text parts are joined by newlines, and the arguments of tool calls are parsed where they are JSON text: templates
    expect objects, OpenAI's protocol sends strings.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role': ..., 'content': ...}}, "
                         f"got {_short(messages)}")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {_short(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} has role {role!r}; it must be a string such as 'system', 'user' or 'assistant'")
    calls = message.get("tool_calls")
    checked = dict(message)
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ValueError(f"{where} has tool_calls {_short(calls)}; it must be a list")
        checked["tool_calls"] = [_checked_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = message.get("content")
    if content is None and not calls:
        raise ValueError(f"{where} ({role}) has no content; give a string")
    if content is not None and not isinstance(content, str):
        checked["content"] = _joined_text(content, f"{where} ({role})")
    return checked


def _joined_text(content: Any, where: str) -> str:
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{where} has content {_short(content)}; it must be a string or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has the content part {_short(part)}; only text is supported: "
                             "{'type': 'text', 'text': ...}")
        texts.append(part["text"])
    return "\n".join(texts)


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {_short(call)}; it must have a 'function' with a 'name' and 'arguments'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} ({function['name']}) has arguments that are not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of JSON schemas (dicts), got {_short(tools)}")
    return [dict(tool) for tool in tools]


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


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
