"""docs/environment.md lists every environment variable that the sources read or set, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("fastgen_jax", "pallas_kernels")
NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
C_GETENV = re.compile(r'getenv\(\s*"(\w+)"')
METHODS = ("get", "setdefault", "pop")


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def constants() -> dict[str, str]:
    """Module-level string constants of both packages, by name."""
    return {
        target.id: statement.value.value
        for tree in trees().values()
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name) and isinstance(statement.value.value, str)
    }


def keys(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that name a variable: of `os.environ[...]`, `os.environ.get(...)` and `os.getenv(...)`."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=key):
                yield key
            case ast.Compare(left=key, comparators=[ast.Attribute(attr="environ")]):
                yield key
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr=method), args=[key, *_]) if (
                method in METHODS
            ):
                yield key
            case ast.Call(func=ast.Attribute(attr="getenv") | ast.Name(id="getenv"), args=[key, *_]):
                yield key


def names_in(tree: ast.Module) -> set[str]:
    """Variables that a module reads or sets; where a key is computed, every literal of the module that looks like one."""
    found = set()
    for key in keys(tree):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.add(key.value)
        elif isinstance(key, ast.Name | ast.Attribute) and (name := _last(key)) in constants():
            found.add(constants()[name])
        else:
            literals = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            candidates = {text for text in literals if isinstance(text, str) and NAME.fullmatch(text)}
            assert candidates, f"line {key.lineno} computes the name of a variable; use a literal or a constant"
            found |= candidates
    return found


def _last(key: ast.Name | ast.Attribute) -> str:
    return key.id if isinstance(key, ast.Name) else key.attr


@cache
def used() -> dict[str, list[str]]:
    """Variable -> the files that read or set it."""
    found: dict[str, list[str]] = {}
    for path, tree in trees().items():
        for name in names_in(tree):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".cc", ".cpp", ".h"):
                for name in C_GETENV.findall(path.read_text()):
                    found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def documented(*headings: str) -> set[str]:
    """Variables in the first columns of the tables under `headings`."""
    names: set[str] = set()
    for section in (ROOT / "docs" / "environment.md").read_text().split("\n## ")[1:]:
        if section.splitlines()[0] in headings:
            rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
            names.update(name for row in rows for name in re.findall(r"`(\w+)`", row))
    return names


OURS = ("Read by fastgen_jax and pallas_kernels", "Set by fastgen_jax and pallas_kernels")


def test_every_variable_in_the_sources_is_documented():
    known = documented(*OURS)
    missing = {name: files for name, files in used().items() if name not in known}
    assert not missing, f"add to docs/environment.md: {missing}"


def test_every_documented_variable_is_in_the_sources():
    assert documented(*OURS) == documented(*OURS) & used().keys()


def test_the_search_finds_every_way_to_read_a_variable():
    tree = ast.parse(
        "import os\nos.environ['A_A']\nos.environ.get('B_B')\nos.getenv('C_C', '')\nos.environ.setdefault('D_D', '1')\n"
        "'E_E' in os.environ\nfor name in ('F_F', 'other'):\n    os.environ[name] = '1'\n"
    )
    assert names_in(tree) >= {"A_A", "B_B", "C_C", "D_D", "E_E", "F_F"}
    assert C_GETENV.findall('const char* threads = std::getenv("G_G");') == ["G_G"]
