"""`fastgen chat`, with a tiny model, on a pipe and under ^C."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgen_jax import Engine
from fastgen_jax.api.pipeline import Pipeline
from fastgen_jax.cli import chat, main
from tests.cli.test_faults import SMALL, without_template

LENGTH = 12  # tokens per answer, each one character or none


class Terminal(Pipeline):
    """A pipeline that is interrupted: `pressed` maps an answer to the numbers of tokens after which ^C is pressed."""

    def __init__(self, engine: Engine, pressed: dict[int, tuple[int, ...]]) -> None:
        super().__init__(engine)
        self.pressed = pressed
        self.conversations: list[list[dict[str, str]]] = []
        self.tokens: list[int] = []

    def stream(self, prompt: Any, **options: Any) -> Iterator[Any]:
        answer = len(self.conversations)
        self.conversations.append(list(prompt))
        self.tokens.append(0)
        for output in super().stream(prompt, **options):
            self.tokens[answer] += 1
            for _ in range(self.pressed.get(answer, ()).count(self.tokens[answer])):
                signal.raise_signal(signal.SIGINT)
            yield output


@pytest.fixture
def talk(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Runs the command on lines of standard input; returns its exit code and the pipeline that answered."""

    def run(lines: io.StringIO, *flags: str, pressed: dict[int, tuple[int, ...]] | None = None) -> tuple[int, Terminal]:
        pipe = Terminal(engine, pressed or {})
        options = {"max_new_tokens": LENGTH, "ignore_eos": True, "do_sample": False}
        monkeypatch.setattr(chat, "make_pipeline", lambda _: (pipe, options))
        monkeypatch.setattr("sys.stdin", lines)
        code = main(["chat", *flags])
        assert not pipe.engine.has_work
        return code, pipe

    return run


def test_piped_lines_are_answered_one_by_one_without_a_prompt(talk, capsys) -> None:
    code, pipe = talk(io.StringIO("hi\nho\n"))
    assert code == 0
    assert pipe.tokens == [LENGTH, LENGTH]
    lines = capsys.readouterr().out.split("\n")
    assert "you> " not in "".join(lines)
    assert lines[:2] == [pipe.conversations[1][1]["content"], lines[1]]


def test_an_interrupt_ends_the_answer_and_not_the_program(talk) -> None:
    code, pipe = talk(io.StringIO("hi\nho\n"), pressed={0: (4,)})
    assert (code, pipe.tokens) == (0, [4, LENGTH])


def test_a_second_interrupt_does_not_wait_for_the_next_token(talk, capsys) -> None:
    code, pipe = talk(io.StringIO("hi\nho\n"), pressed={0: (4, 4)})
    assert (code, pipe.tokens) == (0, [4, LENGTH])
    assert pipe.conversations[1][1]["content"] == capsys.readouterr().out.split("\n")[0]  # of three tokens


def test_an_interrupted_answer_is_part_of_the_conversation(talk, capsys) -> None:
    _, pipe = talk(io.StringIO("hi\nho\n"), "--system", "be", pressed={0: (4,)})
    first = capsys.readouterr().out.split("\n")[0]
    assert [(message["role"], message["content"]) for message in pipe.conversations[1]] == [
        ("system", "be"),
        ("user", "hi"),
        ("assistant", first),
        ("user", "ho"),
    ]


def test_an_interrupt_at_the_prompt_quits(talk) -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            signal.raise_signal(signal.SIGINT)
            return "never\n"

    code, pipe = talk(Interrupted())
    assert (code, pipe.conversations) == (0, [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_message_that_is_too_long_does_not_end_the_conversation(talk, capsys) -> None:
    code, pipe = talk(io.StringIO(f"{'a' * 200}\nhi\n"))
    assert (code, pipe.tokens[1:]) == (1, [LENGTH])
    assert [message["content"] for message in pipe.conversations[1]] == ["hi"]
    assert capsys.readouterr().err.startswith("fastgen: ")


def test_a_model_without_a_chat_template_is_rejected_at_the_start(tmp_path: Path, capsys) -> None:
    assert main(["chat", "--model", str(without_template(tmp_path / "base")), *SMALL]) == 2
    assert "has no chat template" in capsys.readouterr().err
