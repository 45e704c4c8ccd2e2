"""What `--help` says, and how flags are read."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_type_hints

import pytest

import fastgen_jax
from fastgen_jax.cli import COMMANDS, main, make_parser
from fastgen_jax.cli.options import add_fields, flag_form, given_options
from fastgen_jax.cli.parser import Parser
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.scheduling import POLICIES, SamplingParams
from fastgen_jax.serving.settings import ServerConfig

NESTED = ("bench", "simulate")


def parser_of(command: str) -> Parser:
    commands = make_parser([command]).commands()
    assert commands is not None
    return commands.choices[command]


def leaves(parser: Parser) -> Iterator[Parser]:
    commands = parser.commands()
    if commands is None:
        yield parser
    else:
        for child in commands.choices.values():
            yield from leaves(child)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_word_of_help_and_says_its_default(command: str) -> None:
    for parser in leaves(parser_of(command)):
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.option_strings or action.dest} has no help"
            words = " ".join(parser._get_formatter()._expand_help(action).split())
            takes_value = action.nargs != 0 or isinstance(action, argparse.BooleanOptionalAction)
            if action.option_strings and takes_value and not action.required:
                assert "default" in words.lower(), f"{parser.prog} {action.option_strings} does not say its default"
                assert f"{words} (default" not in text  # it is said once
            for choice in action.choices or ():
                assert str(choice) in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_and_ends_well(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: fastgen {command}")
    assert "\x1b" not in printed


def test_help_and_version_take_no_jax() -> None:
    code = """
import sys
from fastgen_jax.cli import main
for flag in ("--version", "--help"):
    try:
        main([flag])
    except SystemExit as left:
        assert left.code == 0
print(sorted(name for name in ("jax", "numpy", "tqdm") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == (f"fastgen_jax {fastgen_jax.__version__}", "[]"), done.stderr
    assert all(any(line.split()[:1] == [command] for line in lines) for command in COMMANDS)


def test_an_environments_keys_are_not_shown_as_a_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGEN_SERVER_KEYS", "sesame")
    assert "sesame" not in parser_of("serve").format_help()


def given(command: str, *argv: str) -> dict[str, object]:
    options = vars(make_parser([command]).parse_args([command, *argv]))
    return given_options({name: value for name, value in options.items() if name not in ("command", "run")})


def test_flags_are_read_as_their_fields_are_typed() -> None:
    assert given(
        "generate",
        "hello",
        "--stop",
        "a",
        "b",
        "--stop",
        "c",
        "--stop-token-ids",
        "5",
        "6",
        "--no-overlap",
        "--max-new-tokens",
        "7",
        "--top-p",
        "0.5",
        "--no-stack-layers",
        "--budget-ladder",
        "16",
        "32",
    ) == {
        "prompts": ("hello",),
        "chat": False,
        "model": "smollm2-135m-instruct",
        "stop": ("a", "b", "c"),
        "stop_token_ids": (5, 6),
        "overlap": False,
        "max_new_tokens": 7,
        "top_p": 0.5,
        "stack_layers": False,
        "budget_ladder": (16, 32),
    }
    assert given("generate", "--stop-token-ids", "5", "--", "a prompt")["prompts"] == ("a prompt",)


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, ServerConfig])
def test_every_field_that_text_can_express_is_a_flag_of_serve_or_generate(cls: type) -> None:
    flags = {*parser_of("serve").flags(), *parser_of("generate").flags()}
    hints = get_type_hints(cls)
    expressed = {f.name for f in fields(cls) if flag_form(hints[f.name]) is not None}
    missing = {name for name in expressed if f"--{name.replace('_', '-')}" not in flags}
    assert missing <= {"n", "logprobs", "prompt_logprobs"}  # generate prints one text a prompt


def test_choices_are_those_that_the_engine_knows(capsys: pytest.CaptureFixture[str]) -> None:
    policy = next(action for action in parser_of("serve")._actions if action.dest == "policy")
    assert set(policy.choices or ()) == set(POLICIES)
    with pytest.raises(SystemExit) as left:
        main(["serve", "m", "--policy", "fastest"])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "invalid choice: 'fastest' (choose from 'splitfuse'" in message


@dataclass(kw_only=True)
class _Everything:
    count: int | None = None
    """How many of `share`. None: as many as there are, 100 %."""
    share: float = 0.5
    """Of the whole,
    on two lines."""
    words: str | Iterable[str] = ()
    """Several."""
    kind: Literal["a", "b"] | Callable[[], int] = "a"
    """Which."""
    secret: str = field(default_factory=lambda: "sesame")
    """None: what the environment says."""
    hook: Callable[[], int] | None = None
    """Not from a terminal."""
    table: Mapping[str, int] = field(default_factory=dict)
    """Neither."""


def test_flags_come_from_annotations_and_docstrings() -> None:
    parser = Parser(prog="p")
    add_fields(parser, _Everything, skip=("share",))
    text = " ".join(parser.format_help().split())
    assert "--count INT How many of --share. Default: as many as there are, 100 %." in text
    assert "--words STR [STR ...] Several. (default: none)" in text
    assert "--kind {a,b} Which. (default: a)" in text
    assert "--secret STR Default: what the environment says." in text
    assert set(parser.flags()) == {"-h", "--help", "--count", "--words", "--kind", "--secret"}
    assert vars(parser.parse_args([])) == {"count": None, "words": None, "kind": None, "secret": None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--max-tokens", "5"], "fastgen generate: '--max-tokens' is not known; did you mean --max-new-tokens?"),
        (["bench", "serve", "--urls", "x"], "fastgen bench serve: '--urls' is not known; did you mean --url?"),
        (["models", "llama"], "fastgen models: 'llama' is not known ("),
        (["generat"], "fastgen: argument COMMAND: invalid choice: 'generat'"),
        (["serve"], "fastgen serve: the following arguments are required: MODEL"),
        ([], "fastgen: the following arguments are required: COMMAND"),
    ],
)
def test_a_misspelt_command_line_is_one_line_that_names_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
