"""`fastgen models`: lists the supported model families and what is supported of each."""

from __future__ import annotations

import argparse
from types import ModuleType

from fastgen_jax.cli.parser import Options
from fastgen_jax.models.families import FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--markdown", action="store_true", help="print the Markdown table of docs/models.md")


def run(options: Options) -> int:
    """Prints one paragraph or table row per family and returns the exit code."""
    print("\n".join(table() if options["markdown"] else paragraphs()))
    return 0


def paragraphs() -> list[str]:
    """Lines for a terminal: the family, its architecture names in config.json, what is supported."""
    width = max(map(len, FAMILIES)) + 2
    lines = []
    for name, family in FAMILIES.items():
        lines += [f"{name:{width}}{', '.join(family.ARCHITECTURES)}", f"{'':{width}}{family.FEATURES}"]
    return lines


def table() -> list[str]:
    """The same as lines of a Markdown table, with a description of each family."""
    rows = [
        f"| {name} | {', '.join(family.ARCHITECTURES)} | {_summary(family)} | {family.FEATURES} |"
        for name, family in FAMILIES.items()
    ]
    return ["| family | architectures | what it is | supported |", "|---|---|---|---|", *rows]


def _summary(family: ModuleType) -> str:
    """The first sentence of the module's docstring."""
    return " ".join((family.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
