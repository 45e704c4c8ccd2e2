"""The flags that describe a pipeline, and the pipeline that they describe."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import add_fields, add_model_flag, given_options

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, every field of `EngineConfig`, and the generation options."""
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.scheduling import SamplingParams

    add_model_flag(parser)
    add_fields(parser.add_argument_group("engine"), EngineConfig)
    # The commands print one text per prompt.
    skip = ("n", "logprobs", "prompt_logprobs", "prompt_logprobs_start", "logprobs_mode")
    add_fields(parser.add_argument_group("generation"), SamplingParams, skip=skip)


def make_pipeline(options: Options) -> tuple[Pipeline, Options]:
    """Returns the pipeline that the options describe, and the generation options among them."""
    from fastgen_jax.api.options import sampling_params
    from fastgen_jax.api.pipeline import pipeline
    from fastgen_jax.engine.config import EngineConfig

    given = given_options(options)
    model = given.pop("model")
    engine = {f.name: given.pop(f.name) for f in fields(EngineConfig) if f.name in given}
    sampling_params(given)  # reports a mistake before the model is loaded
    return pipeline(model, **engine), given


def limit_new_tokens(generation: Options, max_new_tokens: int) -> None:
    """Sets this limit in the generation options unless they have one."""
    if generation.get("max_new_tokens") is None and generation.get("max_length") is None:
        generation["max_new_tokens"] = max_new_tokens
