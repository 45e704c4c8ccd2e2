"""`fastgen chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastgen_jax.cli.options import add_pipeline_arguments, limit_new_tokens, make_pipeline
from fastgen_jax.cli.parser import Options

if TYPE_CHECKING:
    from fastgen_jax.api.pipeline import Pipeline

MAX_NEW_TOKENS = 512  # per answer, if no limit is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    add_pipeline_arguments(parser)


def run(options: Options) -> int:
    """Chats until an empty line, the end of the input, or ^C at the prompt; returns 1 if a message got no answer."""
    system = options.pop("system")
    pipe, generation = make_pipeline(options)
    limit_new_tokens(generation, MAX_NEW_TOKENS)
    pipe.engine.encode([{"role": "user", "content": "?"}])  # raises ValueError now if the model has no chat template
    conversation = [{"role": "system", "content": system}] if system else []
    prompt = "you> " if sys.stdin.isatty() else ""  # no prompt when input is piped
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
        except ValueError as error:  # most likely too long; the conversation so far is kept
            print(f"fastgen: {error}", file=sys.stderr)
            code = 1
            continue
        if answer:
            conversation += [question, {"role": "assistant", "content": answer}]


def _answer(pipe: Pipeline, messages: list[dict[str, str]], generation: Options) -> str:
    """Prints the answer as it is generated and returns it, or the part generated before ^C."""
    pieces: list[str] = []
    with contextlib.suppress(KeyboardInterrupt), _interrupts() as interrupted:
        for output in pipe.stream(messages, **generation):
            pieces.append(output.text)
            print(output.text, end="", flush=True)
            if interrupted.is_set():
                break
    print()
    return "".join(pieces)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Yields an event that ^C sets, so that an answer ends between two tokens; a second ^C raises KeyboardInterrupt."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
