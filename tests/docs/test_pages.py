"""What the documentation names exists: files, links, make targets, and the imports of its snippets.

Links between the pages of the site are checked by its strict build, in `make check`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import PAGES, ROOT, SITE, anchors, blocks, name, without_blocks

PACKAGES = "(?:fastgen_jax|pallas_kernels|tests|notebooks|checkpoints)"
OUTSIDE_THE_SITE = [page for page in PAGES if page not in SITE]


def test_a_reader_follows_a_request_through_at_most_ten_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page[page.index("## A reader's path") :].split("\n## ")[0]
    entries = re.findall(r"^(\d+)\. `([^`]+)`: (.+)$", section, re.MULTILINE)
    files = [file for _, file, _ in entries]
    assert [int(number) for number, _, _ in entries] == list(range(1, len(entries) + 1))
    assert 5 <= len(files) <= 10
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert files[0].startswith("fastgen_jax/serving/"), "the path begins with HTTP"
    assert any(file.startswith("pallas_kernels/") for file in files), "the path reaches a kernel"
    assert files[-1] == "fastgen_jax/engine/outputs.py", "the path ends with the answer"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w./])({PACKAGES}/[\w./-]*\w)", page.read_text())
    assert [file for file in named if not (ROOT / file).exists() and "NAME" not in file] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_a_page_runs_exist(page: Path) -> None:
    text = page.read_text()
    run = re.findall(rf"python -m ({PACKAGES}[\w.]*\w)", text)
    assert [module for module in run if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("page", OUTSIDE_THE_SITE, ids=name)
def test_relative_links_outside_the_site_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", without_blocks(page.read_text())):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_that_a_page_names_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^)make(?: [A-Z_]+=\S+)* ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_snippets_of_a_page_parse_and_import_names_that_exist(page: Path) -> None:
    missing = []
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith(("fastgen_jax", "pallas_kernels"))
            ):
                module = importlib.import_module(node.module)
                missing += [f"{node.module}.{alias.name}" for alias in node.names if not _has(module, alias.name)]
    assert missing == []


def _has(module: ModuleType, attribute: str) -> bool:
    """Whether `from module import attribute` works, submodules included."""
    if hasattr(module, attribute):
        return True
    return importlib.util.find_spec(f"{module.__name__}.{attribute}") is not None
