"""The text of `--help`, and how flags are parsed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_type_hints

import pytest

import fastgen_jax
from fastgen_jax.cli import COMMANDS, GROUPS, main, make_parser
from fastgen_jax.cli.parser import Parser
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.flags import add_fields, flag_arguments, flag_form, given_options, name_value
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
def test_every_flag_has_help_that_states_its_default(command: str) -> None:
    for parser in leaves(parser_of(command)):
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.option_strings or action.dest} has no help"
            words = " ".join(parser._get_formatter()._expand_help(action).split())
            takes_value = action.nargs != 0 or isinstance(action, argparse.BooleanOptionalAction)
            if action.option_strings and takes_value and not action.required:
                assert "default" in words.lower(), f"{parser.prog} {action.option_strings} does not state its default"
                assert f"{words} (default" not in text  # stated once
            for choice in action.choices or ():
                assert str(choice) in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_and_exits_with_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: fastgen {command}")
    assert "\x1b" not in printed


def test_help_and_version_do_not_import_jax() -> None:
    program = Path(__file__).parent / "programs" / "imports_of_help.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == (f"fastgen_jax {fastgen_jax.__version__}", "[]"), done.stderr
    assert all(any(line.split()[:1] == [command] for line in lines) for command in COMMANDS)


def test_keys_from_the_environment_are_not_shown_as_a_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGEN_SERVER_KEYS", "sesame")
    assert "sesame" not in parser_of("serve").format_help()


def given(command: str, *argv: str) -> dict[str, object]:
    options = vars(make_parser([command]).parse_args([command, *argv]))
    return given_options({name: value for name, value in options.items() if name not in ("command", "run")})


def test_flags_are_parsed_as_their_fields_are_typed() -> None:
    flags = "--stop a b --stop c --stop-token-ids 5 6 --no-overlap --max-new-tokens 7 --top-p 0.5 --no-stack-layers"
    assert given("generate", "hello", *flags.split(), "--budget-ladder", "16", "32") == {
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
    one = given("generate", "--stop-token-ids", "5", "--", "a prompt")
    assert (one["stop_token_ids"], one["prompts"]) == ((5,), ("a prompt",))


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ("a", "b"), "stop_token_ids": (5,), "overlap": False, "prefix_caching": True, "top_p": 0.5},
        {"max_new_tokens": 7, "quantize": "int8", "token_budget": None, "budget_ladder": (16, 32)},
    ],
)
def test_flag_arguments_are_parsed_to_the_options_they_were_made_from(options: dict[str, object]) -> None:
    arguments = [argument for name, value in options.items() for argument in flag_arguments(name, value)]
    parsed = given("generate", "--chat", *arguments)
    assert {name: parsed.get(name) for name in options} == options


def test_flags_that_were_not_given_are_not_options() -> None:
    assert given("generate") == {"prompts": (), "chat": False, "model": "smollm2-135m-instruct"}
    options = vars(make_parser(["serve"]).parse_args(["serve", "m", "--port", "0", "--token-budget", "8"]))
    assert given_options(options, EngineConfig) == {"token_budget": 8}
    assert given_options(options, ServerConfig) == {"port": 0}


@pytest.mark.parametrize(
    ("pair", "value"),
    [("a=5", 5), ("a=[1, 2]", (1, 2)), ("a=true", True), ("a=null", None), ("a=int8", "int8"), ("a=b=c", "b=c")],
)
def test_a_value_is_json_or_text(pair: str, value: object) -> None:
    assert name_value(pair) == ("a", value)


@pytest.mark.parametrize("pair", ["a", "a=", "=5", ""])
def test_a_setting_without_name_or_value_is_one_line_that_names_the_flag(
    pair: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "in.jsonl", "out.jsonl", "--set", pair])
    assert capsys.readouterr().err.startswith(f"fastgen batch: argument --set: {pair!r} is not of the form NAME=VALUE (")


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, ServerConfig])
def test_every_field_that_can_be_written_as_text_is_a_flag_of_serve_or_generate(cls: type) -> None:
    flags = {*parser_of("serve").flags(), *parser_of("generate").flags()}
    hints = get_type_hints(cls)
    expressed = {f.name for f in fields(cls) if flag_form(hints[f.name]) is not None}
    missing = {name for name in expressed if f"--{name.replace('_', '-')}" not in flags}
    # `generate` prints one text per prompt.
    assert missing <= {"n", "logprobs", "logprobs_mode", "prompt_logprobs", "prompt_logprobs_start"}


def test_choices_are_those_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    policy = next(action for action in parser_of("serve")._actions if action.dest == "policy")
    assert set(policy.choices or ()) == set(POLICIES)
    quantize = next(action for action in parser_of("serve")._actions if action.dest == "quantize")
    assert list(quantize.choices or ()) == ["int8", "int4", "fp8", "w8a8", "none"]
    with pytest.raises(SystemExit) as left:
        main(["serve", "m", "--policy", "fastest"])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "invalid choice: 'fastest' (choose from 'splitfuse'" in message


@dataclass(kw_only=True)
class _Example:
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
    """None: from the environment."""
    hook: Callable[[], int] | None = None
    """Not from a terminal."""
    table: Mapping[str, int] = field(default_factory=dict)
    """Neither."""


def test_flags_come_from_annotations_and_docstrings() -> None:
    parser = Parser(prog="p")
    add_fields(parser, _Example, skip=("share",))
    text = " ".join(parser.format_help().split())
    assert "--count INT How many of --share. Default: as many as there are, 100 %." in text
    assert "--words STR [STR ...] Several. (default: none)" in text
    assert "--kind {a,b} Which. (default: a)" in text
    assert "--secret STR Default: from the environment." in text
    assert set(parser.flags()) == {"-h", "--help", "--count", "--words", "--kind", "--secret"}
    assert vars(parser.parse_args([])) == {"count": None, "words": None, "kind": None, "secret": None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "--max-tokens", "5"],
            "fastgen generate: unknown argument '--max-tokens'; did you mean --max-new-tokens?",
        ),
        (["bench", "serve", "--urls", "x"], "fastgen bench serve: unknown argument '--urls'; did you mean --url?"),
        (["models", "llama"], "fastgen models: unknown argument 'llama' ("),
        (["generat"], "fastgen: unknown command 'generat'; did you mean generate?"),
        (["bench", "ofline"], "fastgen bench: unknown benchmark 'ofline'; did you mean offline?"),
        (["serve"], "fastgen serve: the following arguments are required: MODEL"),
    ],
)
def test_a_misspelled_command_line_is_one_line_that_names_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_without_a_command_the_help_is_printed_and_every_command_is_under_one_heading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    for heading, commands in GROUPS.items():
        section = printed.split(f"\n{heading}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines() if line[2] != " "] == list(commands)
    assert len(printed.splitlines()) < 60


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_knows_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    for parser in leaves(parser_of("run")):
        assert all(flag.lstrip("-") in script for flag in parser.flags())
    assert "smollm2-135m-instruct" in script


def test_bash_completes_commands_flags_choices_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "fastgen"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        command = [bash, Path(__file__).parent / "programs" / "complete.bash", script, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()

    assert completed("fastgen", "ru") == ["run"]
    assert completed("fastgen", "run", "smo") == ["smollm2-135m-instruct"]
    assert completed("fastgen", "run", "--max-num") == ["--max-num-seqs"]
    assert completed("fastgen", "serve", "m", "--dtype", "b") == ["bfloat16"]
    assert completed("fastgen", "bench", "off") == ["offline"]
