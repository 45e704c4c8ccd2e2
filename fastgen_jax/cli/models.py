"""`fastgen models`: the families that can be served, and what of each."""

from __future__ import annotations

import argparse
from typing import Any

from fastgen_jax.models.families import FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--markdown`."""
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/models.md")


def run(options: dict[str, Any]) -> int:
    """Prints one family a paragraph, or one a row, and returns the exit code."""
    print("\n".join(table() if options["markdown"] else paragraphs()))
    return 0


def paragraphs() -> list[str]:
    """Lines for a terminal: the family, the architectures of its config.json, what is supported."""
    width = max(map(len, FAMILIES)) + 2
    lines = []
    for name, family in FAMILIES.items():
        lines += [f"{name:{width}}{', '.join(family.ARCHITECTURES)}", f"{'':{width}}{family.FEATURES}"]
    return lines


def table() -> list[str]:
    """Lines of a Markdown table of the same, with what each family is."""
    rows = [
        f"| {name} | {', '.join(family.ARCHITECTURES)} | {_summary(family)} | {family.FEATURES} |"
        for name, family in FAMILIES.items()
    ]
    return ["| family | architectures | what it is | supported |", "|---|---|---|---|", *rows]


def _summary(family: Any) -> str:
    """The first sentence of the module's docstring."""
    return " ".join(family.__doc__.split("\n\n")[0].split()).rstrip(".")
