"""Flags that are generated from dataclass fields, and the pipeline that they describe.

A flag knows whether it was given: what was not is filled elsewhere, from the model's own generation_config among others.
That is why these are flags of argparse and not of a library that builds the finished dataclass, defaults and all.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastgen_jax.cli.parser import in_words

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline

DEFAULT_MODEL = "smollm2-135m-instruct"
MODEL_HELP = "directory in Hugging Face's layout, .gguf file, snapshot, built-in name or repo id on the hub"


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, every field of `EngineConfig`, and the generation options."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.scheduling import SamplingParams

    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    add_fields(parser.add_argument_group("engine"), EngineConfig)
    # The commands print one text a prompt.
    add_fields(parser.add_argument_group("generation"), SamplingParams, skip=("n", "logprobs", "prompt_logprobs"))


def add_fields(group: Any, cls: type, *, skip: Sequence[str] = ()) -> None:
    """One flag a field of a dataclass that text can express; None means that it was not given.

    Type and choices come from the annotation, the help from the docstring below the field. A bool gets a --no- form, and
    what holds several takes them after one flag or after several.
    """
    hints, documents = get_type_hints(cls), field_docstrings(cls)
    names = {field.name for field in fields(cls)}
    for field in fields(cls):
        form = flag_form(hints[field.name])
        if form is not None and field.name not in skip:
            text = _help(documents.get(field.name, ""), field)
            # `max_num_seqs` in a docstring is --max-num-seqs here.
            text = re.sub(r"`(\w+)`", lambda word: _flag(word[1]) if word[1] in names else word[1], text)
            group.add_argument(_flag(field.name), dest=field.name, default=None, help=text, **form)


def flag_form(hint: Any) -> dict[str, Any] | None:
    """How argparse reads a value of this type, as arguments of `add_argument`; None for what text cannot express."""
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        if get_origin(kind) in (tuple, list, Sequence, Iterable) and get_args(kind)[0] in (int, float, str):
            one = get_args(kind)[0]
            return {"type": one, "nargs": "+", "action": "extend", "metavar": one.__name__.upper()}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    one = next((kind for kind in (float, int, str) if kind in kinds), None)
    return None if one is None else {"type": one, "metavar": one.__name__.upper()}


@functools.cache
def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, in one line."""
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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _help(text: str, field: Field[Any]) -> str:
    """The docstring with the default in words; that of a factory may be a secret, so it is never shown."""
    is_made = field.default_factory is not MISSING
    if field.default is None or is_made:
        text = re.sub(r"\bNone: ", "Default: ", text)
    if not is_made and not re.search(r"\bdefault\b", text, re.IGNORECASE):
        text = f"{text} (default: {in_words(field.default)})"
    return text.replace("%", "%%")


def make_pipeline(options: dict[str, Any]) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline that the options describe, and the generation options among them."""
    from fastgen_jax.api.options import sampling_params
    from fastgen_jax.api.pipeline import pipeline
    from fastgen_jax.engine.config import EngineConfig

    given = given_options(options)
    model = given.pop("model")
    engine = {f.name: given.pop(f.name) for f in fields(EngineConfig) if f.name in given}
    sampling_params(given)  # a mistake shows before the model is loaded
    return pipeline(model, **engine), given


def limit_answers(generation: dict[str, Any], max_new_tokens: int) -> None:
    """Gives the generation options this limit, if they have none."""
    if generation.get("max_new_tokens") is None and generation.get("max_length") is None:
        generation["max_new_tokens"] = max_new_tokens


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items() if value is not None}
