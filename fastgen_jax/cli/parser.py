"""The argument parser of all commands: shows every default, and reports a mistake in one line with the nearest flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from fastgen_jax.flags import in_words

Options: TypeAlias = dict[str, Any]
"""What a command was called with, by the names of its flags. `Any`: each flag has a type of its own."""


class Parser(argparse.ArgumentParser):
    """An argparse parser with its own error messages and defaults in the help; subcommands use this class too."""

    def __init__(self, *, groups: Mapping[str, Collection[str]] | None = None, **options: Any) -> None:
        """`groups` are headings for the help, with the subcommands under each."""
        super().__init__(**{"formatter_class": _Formatter, **options})
        self._groups = groups or {}

    def format_help(self) -> str:
        """The help text, with the subcommands under their headings."""
        commands = self.commands()
        if commands is None or not self._groups:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        by_name = {entry.dest: entry for entry in commands._choices_actions}
        for heading, names in self._groups.items():
            formatter.start_section(heading)
            formatter.add_arguments([by_name[name] for name in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action is not commands])
        formatter.end_section()
        formatter.add_text(f"Flags of a command: {self.prog} COMMAND --help")
        return formatter.format_help()

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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's check of choices; a misspelled command is answered with the nearest instead of with the list of all."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(value, action.choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(None, f"unknown {str(action.metavar).lower()} {value!r}{hint}")
        super()._check_value(action, value)

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
