"""Command-line flags shared by `fastgen` commands and benchmarks: generated from dataclass fields, or written NAME=VALUE.

Generated flags are argparse flags rather than those of a library that builds the finished dataclass, because a flag must
know whether it was given. A value that was not given comes from elsewhere, such as the model's generation_config.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import json
import re
import textwrap
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DEFAULT_MODEL = "smollm2-135m-instruct"
MODEL_HELP = "Hugging Face directory, .gguf file, snapshot, built-in name, or repo id on the Hub"


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` with the default model."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")


def add_fields(group: argparse._ActionsContainer, cls: type, *, skip: Collection[str] = ()) -> None:
    """Adds one flag per dataclass field that can be written as text; its value is None if it was not given.

    Type and choices come from the annotation, the help from the docstring below the field. A bool also gets a --no- form.
    A field that holds several values accepts them after one flag or after repeated flags.
    """
    hints, docstrings = get_type_hints(cls), field_docstrings(cls)
    names = {field.name for field in fields(cls)}
    for field in fields(cls):
        form = flag_form(hints[field.name])
        if form is not None and field.name not in skip:
            text = _help(docstrings.get(field.name, ""), field)
            # `max_num_seqs` in a docstring is --max-num-seqs here.
            text = re.sub(r"`(\w+)`", lambda word: _flag(word[1]) if word[1] in names else word[1], text)
            group.add_argument(_flag(field.name), dest=field.name, default=None, help=text, **form)


def flag_form(hint: object) -> dict[str, Any] | None:
    """The arguments of `add_argument` that parse a value of this type; None if it cannot be written as text."""
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if choices := [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]:
        return {"choices": choices, "type": type(choices[0])}
    for kind in kinds:
        if get_origin(kind) in (tuple, list, Sequence, Iterable) and get_args(kind)[0] in (int, float, str):
            item = get_args(kind)[0]
            return {"type": item, "nargs": "+", "action": "extend", "metavar": item.__name__.upper()}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    scalar = next((kind for kind in (float, int, str) if kind in kinds), None)
    return None if scalar is None else {"type": scalar, "metavar": scalar.__name__.upper()}


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, joined into one line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def flag_arguments(name: str, value: object) -> list[str]:
    """The command-line arguments that give the field `name` this value; none for None. The inverse of `add_fields`."""
    flag = _flag(name)
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def given_options(options: Mapping[str, Any], cls: type | None = None) -> dict[str, Any]:
    """The options that were given, lists as tuples; with `cls` only those that are fields of this dataclass."""
    names = options.keys() if cls is None else {field.name for field in fields(cls)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value is not None and name in names
    }


def name_text(pair: str) -> tuple[str, str]:
    """The argparse type of NAME=TEXT."""
    name, separator, value = pair.partition("=")
    if not separator or not name or not value:
        raise argparse.ArgumentTypeError(f"{pair!r} is not of the form NAME=VALUE")
    return name, value


def name_value(pair: str) -> tuple[str, Any]:
    """The argparse type of NAME=VALUE: a VALUE that is JSON (number, true, null, list) is parsed, any other is text.

    A list becomes a tuple.
    """
    name, text = name_text(pair)
    try:
        value = json.loads(text)
    except ValueError:
        return name, text
    return name, tuple(value) if isinstance(value, list) else value


def in_words(value: object) -> str:
    """A default as a user would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _alternatives(hint: object) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _help(text: str, field: Field[Any]) -> str:
    """The docstring with its default in words. The default of a factory may be a secret, so it is never shown."""
    has_factory = field.default_factory is not MISSING
    if field.default is None or has_factory:
        text = re.sub(r"\bNone: ", "Default: ", text)
    if not has_factory and not re.search(r"\bdefault\b", text, re.IGNORECASE):
        text = f"{text} (default: {in_words(field.default)})"
    return text.replace("%", "%%")
