"""`fastgen chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from fastgen_jax.cli.options import add_pipeline_arguments, limit_answers, make_pipeline

MAX_NEW_TOKENS = 512  # of an answer, if no limit is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--system", metavar="TEXT", help="a first message that sets the tone")
    add_pipeline_arguments(parser)


def run(options: dict[str, Any]) -> int:
    """Talks until an empty line, the end of the input, or ^C at the prompt; 1 if a message could not be answered."""
    system = options.pop("system")
    pipe, generation = make_pipeline(options)
    limit_answers(generation, MAX_NEW_TOKENS)
    pipe.engine.encode([{"role": "user", "content": "?"}])  # ValueError for a model that cannot chat, before it is tried
    conversation = [{"role": "system", "content": system}] if system else []
    prompt = "you> " if sys.stdin.isatty() else ""  # a pipe is not asked
    code = 0
    while True:
        try:
            text = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return code
        if not text.strip():
            return code
        question = {"role": "user", "content": text}
        try:
            answer = _answer(pipe, [*conversation, question], generation)
        except ValueError as error:  # too long, most likely: what was said before stays
            print(f"fastgen: {error}", file=sys.stderr)
            code = 1
            continue
        if answer:
            conversation += [question, {"role": "assistant", "content": answer}]


def _answer(pipe: Any, messages: list[dict[str, str]], generation: dict[str, Any]) -> str:
    """Prints the answer as it comes and returns it, or as much of it as came before ^C."""
    pieces: list[str] = []
    with contextlib.suppress(KeyboardInterrupt), _interrupts() as asked:
        for output in pipe.stream(messages, **generation):
            pieces.append(output.text)
            print(output.text, end="", flush=True)
            if asked.is_set():
                break
    print()
    return "".join(pieces)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """What is set by ^C, so that an answer ends between two tokens; a second ^C raises KeyboardInterrupt at once."""
    asked = threading.Event()

    def interrupt(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
