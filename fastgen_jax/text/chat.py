"""Chat templates: rendering a conversation as the prompt format that a model was trained on.

The environment is that of `apply_chat_template` in transformers 5.15, for which templates are written.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastgen_jax.json_types import JsonFields
from fastgen_jax.text.adapt import required_texts, shows_parts, versions
from fastgen_jax.text.messages import checked_messages, short, text_of
from fastgen_jax.text.template_traits import traits_of

if TYPE_CHECKING:
    import jinja2
    from jinja2.parser import Parser


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template, and where it comes from."""

    name: str
    """"default", "tool_use", "rag", ..., or "given" for the user's own."""
    text: str
    origin: str | None = None
    """Its file; None if it comes from elsewhere."""

    def __str__(self) -> str:
        return f"{self.name!r}" + (f" of {self.origin}" if self.origin else "")


def template_fields(templates: Mapping[str, ChatTemplate]) -> dict[str, Any]:
    """The fields of a `Tokenizer` with these templates."""
    return {
        "templates": {name: template.text for name, template in templates.items()},
        "template_origins": {name: template.origin for name, template in templates.items() if template.origin is not None},
    }


def find_template(given: str, templates: Mapping[str, ChatTemplate]) -> ChatTemplate:
    """The template that a user means by a name among `templates`, the path of a file, or the text of a template.

    Raises ValueError if it is none of these, or does not parse.
    """
    if any(mark in given for mark in ("{{", "{%", "{#")):
        found = ChatTemplate(name="given", text=given)
    elif given in templates:
        found = templates[given]
    else:
        file = Path(given).expanduser()
        if not os.path.isfile(file):  # unlike Path.is_file, it accepts names that are too long
            names = ", ".join(map(repr, templates)) or "it has none"
            raise ValueError(
                f"chat_template is {given[:80]!r}; it must be a file, the name of one of this model's templates ({names}), "
                "or the text of a template, which contains {{ or {%"
            )
        try:
            text = file.read_text(encoding="utf-8")
            text = json.loads(text)["chat_template"] if file.suffix == ".json" else text
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template: {file} is not text in UTF-8 ({error}); pass a .jinja file") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'chat_template: {file} must be a JSON object with a "chat_template" ({error!r}); correct it, '
                "or pass a .jinja file"
            ) from error
        if not isinstance(text, str):
            raise ValueError(f'chat_template: {file} has {short(text)} as "chat_template"; it must be a string')
        found = ChatTemplate(name="given", text=text, origin=str(file))
    _compile(found)
    return found


def variables_of(template: ChatTemplate) -> frozenset[str]:
    """The variables that a template reads, such as "messages", "tools" or "enable_thinking"."""
    return traits_of(template.text, _environment()).variables


def render_chat(
    template: ChatTemplate,
    messages: Sequence[JsonFields],
    *,
    add_generation_prompt: bool,
    tools: Sequence[JsonFields] | None,
    named_tokens: Mapping[str, str],
    extra: Mapping[str, object],
) -> str:
    """Returns the rendered prompt; see `Tokenizer.apply_chat_template`.

    A template may accept several versions of a conversation. The first one is used that it renders without losing a
    developer's instructions, or the result of a tool.
    """
    checked = checked_messages(messages)
    variables = {
        **named_tokens,
        "documents": None,
        **extra,
        "tools": _checked_tools(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    compiled = _compile(template)
    required = required_texts(checked, template.text)
    rendered, refusal = None, None
    for version in versions(checked, template.text, traits_of(template.text, _environment())):
        try:
            text = compiled.render({**variables, "messages": version})
        except Exception as error:  # a template is a program: any exception means that it refuses this conversation
            refusal = refusal or error
            continue
        if all(part in text for part in required) and not shows_parts(text):
            return text
        rendered = rendered or text
    if rendered is not None:
        return rendered
    raise ValueError(f"the chat template {template} refuses this conversation{_described(refusal)}") from refusal


def within_last_message(text: str, messages: Sequence[JsonFields]) -> str:
    """The prompt `text` up to the end of the content of the last message; ValueError if that content is not in it."""
    content = checked_messages(messages)[-1]["content"]
    last = text_of(content[-1:] if isinstance(content, list) else content)
    start = text.rfind(last.strip()) if last.strip() else -1
    if start < 0:
        raise ValueError(
            f"continue_final_message is true, but the content of the last message, {short(last)}, is not in the prompt: "
            "it is empty, or the chat template changes it; omit continue_final_message"
        )
    # Templates strip contents or not: the white space at the end belongs to the content only where it is printed.
    whole = last.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else last.strip())]


def _checked_tools(tools: Sequence[JsonFields] | None) -> list[JsonFields] | None:
    if not tools:
        return None
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of JSON schemas (dicts), got {short(tools)}")
    return [dict(tool) for tool in tools]


def _described(error: Exception | None) -> str:
    """What a template raised; if that was not on purpose, also its line and what to do about it."""
    import jinja2

    if error is None:
        return ": it renders nothing"
    if type(error) is jinja2.TemplateError:  # by raise_exception
        return f": {error}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]  # jinja2 names compiled templates so
    where = f" (line {lines[-1]})" if lines else ""
    return f"{where}: {str(error) or type(error).__name__}; correct the template, or pass another one as chat_template"


def _compile(template: ChatTemplate) -> jinja2.Template:
    import jinja2

    try:
        return _compiled(template.text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template {template} does not parse, line {error.lineno}: {error.message}; correct it, "
            "or pass another one as chat_template"
        ) from error
    except Exception as error:  # Python limits how deeply its blocks may be nested
        raise ValueError(
            f"the chat template {template} does not parse: {error}; correct it, or pass another one as chat_template"
        ) from error


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

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            # A scope: what the body sets is not visible after it, as in transformers.
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

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
