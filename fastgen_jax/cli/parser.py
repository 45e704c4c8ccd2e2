"""The argument parser of all commands: every default is shown, and a mistake is one line, with the nearest flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, but for its errors and defaults; the parsers of subcommands are of this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Exits with 2 and one line for what is wrong."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = _command_of(self, options)
            flag = unknown[0].split("=")[0]
            # A word alone is a value too many; the nearest flag would be no help.
            near = difflib.get_close_matches(flag, command.flags(), n=1) if flag.startswith("-") else []
            command.error(f"{unknown[0]!r} is not known" + (f"; did you mean {near[0]}?" if near else ""))
        return options

    def flags(self) -> list[str]:
        """Every spelling of every flag."""
        return [flag for action in self._actions for flag in action.option_strings]

    def commands(self) -> argparse._SubParsersAction[Parser] | None:
        """The action that chooses a subcommand; its `choices` are their parsers."""
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage, which for most commands fills a screen."""
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Adds the default to a help that does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        takes_value = bool(action.option_strings) and (
            action.nargs != 0 or isinstance(action, argparse.BooleanOptionalAction)
        )
        if not action.help or not takes_value or action.required or "default" in action.help.lower():
            return action.help
        return f"{action.help} (default: {in_words(action.default)})"


def in_words(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _command_of(parser: Parser, options: argparse.Namespace) -> Parser:
    """The parser of the subcommand that was called, however deep."""
    commands = parser.commands()
    return parser if commands is None else _command_of(commands.choices[getattr(options, commands.dest)], options)
