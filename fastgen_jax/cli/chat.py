"""`fastgen chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from fastgen_jax.cli.options import add_pipeline_arguments, make_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--system", help="a first message that sets the tone")
    add_pipeline_arguments(parser)


def run(options: dict[str, Any]) -> int:
    """Runs the command on its parsed options and returns the exit code."""
    system = options.pop("system")
    pipe, generation = make_pipeline(options)
    generation.setdefault("max_new_tokens", 512)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            text = input("you> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        answer = ""
        for output in pipe.stream(messages, **generation):
            answer += output.text
            print(output.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})
