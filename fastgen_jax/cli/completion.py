"""`fastgen completion`: prints the script that completes commands, flags and names of models in a shell."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

from fastgen_jax.cli import COMMANDS, make_parser
from fastgen_jax.cli.parser import Options, Parser

# A file that the shell reads when it completes this command for the first time. Reading it costs nothing at the start of a
# shell, unlike making it: that imports every command.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/fastgen",
    "zsh": "~/.zsh/completions/_fastgen",
    "fish": "~/.config/fish/completions/fastgen.fish",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("shell", choices=tuple(PLACES), metavar="SHELL", help=f"{', '.join(PLACES)}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [f"  {shell:6}fastgen completion {shell} > {place}" for shell, place in PLACES.items()]
    note = "For zsh, the folder must be in $fpath before compinit runs. New shells then complete with the Tab key."
    parser.epilog = "\n".join(["Write the script into a folder that the shell reads, which must exist:", *lines, note])


def run(options: Options) -> int:
    """Prints the script and returns the exit code."""
    import shtab

    parser = make_parser(list(COMMANDS))
    for action in _actions(parser):
        if action.dest == "model":
            action.complete = _models()  # type: ignore[attr-defined] (read by shtab)
        elif action.type is Path or action.metavar in ("FILE", "PATH"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options["shell"]))
    return 0


def _actions(parser: Parser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its subcommands."""
    commands = parser.commands()
    for action in parser._actions:
        if action is not commands:
            yield action
    for child in commands.choices.values() if commands else ():
        yield from _actions(child)


def _models() -> dict[str, str | dict[str, str]]:
    """What completes a model: built-in names and files, in the form of shtab's `complete`."""
    from fastgen_jax.checkpoint.built_in import BUILT_IN

    names = " ".join(map(shlex.quote, BUILT_IN))
    return {
        "bash": "_fastgen_models",
        "zsh": "_fastgen_models",
        "fish": f"(printf '%s\\n' {names}; __fish_complete_path (commandline -ct))",
        "preamble": {
            "bash": f'_fastgen_models() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
            "zsh": f"_fastgen_models() {{ compadd -- {names}; _files }}",
        },
    }
