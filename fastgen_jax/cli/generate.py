"""`fastgen generate`: answers prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastgen_jax.cli.options import add_pipeline_arguments, make_pipeline
from fastgen_jax.cli.parser import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="texts to continue (default: one per line of standard input)"
    )
    parser.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    add_pipeline_arguments(parser)


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    prompts: list[str] = options.pop("prompts") or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    chat = options.pop("chat")
    if not prompts:
        raise ValueError("no prompts; pass them as arguments, or on standard input, one per line")
    pipe, generation = make_pipeline(options)
    items: Sequence[str | list[dict[str, str]]] = (
        [[{"role": "user", "content": text}] for text in prompts] if chat else prompts
    )
    if len(items) == 1:
        for output in pipe.stream(items[0], **generation):
            print(output.text, end="", flush=True)
        print()
        return 0
    for prompt, response in zip(prompts, pipe(items, **generation), strict=True):
        print(f"> {prompt}\n{response.generated_text}\n")
    return 0
