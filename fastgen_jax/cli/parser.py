"""The argument parser of all commands: shows every default, and reports a mistake in one line with the nearest flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from fastgen_jax.flags import in_words

Options: TypeAlias = dict[str, Any]
"""What a command was called with, by the names of its flags. `Any`: each flag has a type of its own."""


class Parser(argparse.ArgumentParser):
    """An argparse parser with its own error messages and defaults in the help; subcommands use this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    # argparse declares this method as overloads on the type of `namespace`, hence the two Any.
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses the arguments; on a mistake it prints one line and exits with 2."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = _command_of(self, options)
            flag = unknown[0].split("=")[0]
            # An unexpected positional argument is not a misspelled flag.
            near = difflib.get_close_matches(flag, command.flags(), n=1) if flag.startswith("-") else []
            command.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return options

    def flags(self) -> list[str]:
        """Every spelling of every flag."""
        return [flag for action in self._actions for flag in action.option_strings]

    def commands(self) -> argparse._SubParsersAction[Parser] | None:
        """The action that selects a subcommand; its `choices` are their parsers."""
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)

    def error(self, message: str) -> NoReturn:
        """Prints one line instead of the usage, which fills a screen for most commands, and exits with 2."""
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Appends the default to a help text that does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        takes_value = bool(action.option_strings) and (
            action.nargs != 0 or isinstance(action, argparse.BooleanOptionalAction)
        )
        if not action.help or not takes_value or action.required or "default" in action.help.lower():
            return action.help
        return f"{action.help} (default: {in_words(action.default)})"


def _command_of(parser: Parser, options: argparse.Namespace) -> Parser:
    """The parser of the innermost subcommand that was called."""
    commands = parser.commands()
    return parser if commands is None else _command_of(commands.choices[getattr(options, commands.dest)], options)
