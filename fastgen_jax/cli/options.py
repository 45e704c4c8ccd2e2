"""Flags that are generated from dataclass fields, and the pipeline that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline

DEFAULT_MODEL = "smollm2-135m-instruct"


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, every field of `EngineConfig`, and the generation options."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.scheduling import SamplingParams

    parser.add_argument("--model", default=DEFAULT_MODEL,
                        help="directory, .gguf file, built-in name or repo id (default: %(default)s)")
    add_fields(parser.add_argument_group("engine"), EngineConfig)
    add_fields(parser.add_argument_group("generation"), SamplingParams,
               skip=("n", "logprobs", "prompt_logprobs", "logit_bias"))


def add_fields(group: Any, cls: type, *, skip: Sequence[str] = ()) -> None:
    """One flag a dataclass field, None meaning that the field's default stands."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name in skip:
            continue
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
        if bool in kinds:
            group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=None)
        elif "tuple" in str(hint):
            kind = int if "int" in str(hint) else str
            group.add_argument(flag, dest=field.name, type=kind, nargs="+", default=None, metavar=kind.__name__.upper())
        else:
            kind = next((kind for kind in (int, float) if kind in kinds), str)
            kind = float if float in kinds else kind
            group.add_argument(flag, dest=field.name, type=kind, default=None, metavar=kind.__name__.upper())


def make_pipeline(options: dict[str, Any]) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline that the options describe, and the generation options among them."""
    from fastgen_jax.api.options import sampling_params
    from fastgen_jax.api.pipeline import pipeline
    from fastgen_jax.engine.config import EngineConfig

    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
             for name, value in options.items() if value is not None}
    model = given.pop("model")
    engine = {f.name: given.pop(f.name) for f in fields(EngineConfig) if f.name in given}
    sampling_params(given)  # a mistake shows before the model is loaded
    return pipeline(model, **engine), given
