"""The documentation as the tests read it: Markdown files, their fenced blocks and headings."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "checkpoints" / "README.md", *SITE]


def name(path: Path) -> str:
    """A path as it appears in a test's id."""
    return path.relative_to(ROOT).as_posix()


_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language, in order; by default those without one."""
    return [text for _, marked, text in _BLOCK.findall(path.read_text()) if marked == language]


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", text)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path.read_text()), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
