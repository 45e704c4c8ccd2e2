"""Every `fastgen` command in the documentation exists, with every flag that is shown."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from fastgen_jax.cli import COMMANDS, main
from tests.docs.pages import PAGES, ROOT, blocks, name, without_blocks

NESTED = ("bench", "simulate")


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command on a page, in fenced blocks and inline, without comments."""
    text = page.read_text()
    inline = re.findall(r"`(fastgen [^`]+)`", without_blocks(text))
    lines = [line.strip() for block in blocks(page) for line in block.replace("\\\n", " ").split("\n")]
    commands = [part for found in inline + lines for part in re.split(r"&&|[|#{}]|; ", found.replace("\n", " "))]
    return [command.split() for command in commands if command.strip().startswith("fastgen ")]


@cache
def flags_of(*command: str) -> frozenset[str]:
    """The flags that `fastgen COMMAND --help` lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0, f"fastgen {' '.join(command)} is not a command"
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", printed.getvalue()))


PAGES_WITH_COMMANDS = [page for page in PAGES if commands_of(page)]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=name)
def test_commands_of_a_page_and_their_flags_exist(page: Path) -> None:
    for words in commands_of(page):
        command = words[1]
        if not re.fullmatch(r"[a-z]+", command):  # `fastgen --help`, or a placeholder
            continue
        assert command in COMMANDS, " ".join(words)
        path = words[1:3] if command in NESTED and words[2:] and re.fullmatch(r"[a-z-]*[a-z]", words[2]) else words[1:2]
        shown = {word.strip("[]'").split("=")[0] for word in words[len(path) + 1 :] if re.match(r"\[?--?[a-z]", word)}
        assert shown <= flags_of(*path), " ".join(words)


def test_the_table_of_model_families_is_the_one_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--markdown"]) == 0
    page = (ROOT / "docs" / "models.md").read_text()
    assert capsys.readouterr().out.strip() in page, "run python -m tests.models.parity, which rewrites the table"
