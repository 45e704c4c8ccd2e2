"""Checks the shapes that our functions declare, in tests only.

A function annotated with jaxtyping's types, such as `q: Float[Array, "T H D"]`, is checked by jaxtyping and beartype on
every call: the kind of dtype, the rank, and that an axis letter has one size throughout the call. Other functions stay
as they are.

The checked modules import jaxtyping for type checkers alone (`if TYPE_CHECKING:`), so that production neither needs nor
loads it. The import hook below makes that one import real. Every other name in the annotations of a checked function
must exist in its module at run time.

A shape with a single axis begins with a space, `Int[Array, " T"]`: ruff would otherwise take the text for the name of a
type.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

CHECKED_MODULES = ("pallas_kernels", "fastgen_jax.core", "fastgen_jax.models", "fastgen_jax.engine.sampling")
DECORATOR = "_checks_shapes"


def install(modules: Sequence[str] = CHECKED_MODULES) -> None:
    """Checks the functions of `modules` and of their submodules. Call it before the first of them is imported."""
    loaded = [name for name in sys.modules if _is_in(name, modules)]
    if loaded:
        raise ValueError(f"shape checks must be installed before {loaded[0]} is imported")
    sys.meta_path.insert(0, _Finder(modules))


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


class _Finder(MetaPathFinder):
    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if _is_in(fullname, self.modules) else None
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compiles the source each time: the cached bytecode is that of the unchecked module."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        if names := _jaxtyping_names(tree):
            _add_checks(tree, names)
        return compile(tree, path, "exec", dont_inherit=True)


def _jaxtyping_names(tree: ast.Module) -> set[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _add_checks(tree: ast.Module, names: set[str]) -> None:
    # `Array` alone says nothing about a shape, so a function that only has that is not checked.
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and _annotation_names(node) & (names - {"Array"}):
            # Innermost: jit, custom_jvp and the like then wrap the checked function.
            node.decorator_list.append(ast.Name(DECORATOR, ast.Load(), lineno=node.lineno, col_offset=node.col_offset))
    imports = ast.parse(
        f"from tests.shape_checks import checked as {DECORATOR}\nfrom jaxtyping import {', '.join(sorted(names))}"
    ).body
    # Not on the first line: a docstring and imports from __future__ must come first.
    is_future = [isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body]
    position = is_future.index(True) + 1 if True in is_future else int(ast.get_docstring(tree) is not None)
    tree.body[position:position] = imports


def _annotation_names(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [argument.annotation for argument in every if argument is not None] + [function.returns]
    return {node.id for part in annotations if part is not None for node in ast.walk(part) if isinstance(node, ast.Name)}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with its annotations checked on every call."""
    from beartype import beartype
    from jaxtyping import jaxtyped

    @functools.cache
    def decorated() -> Callable[..., Any]:
        # Raises NameError for a name that does not exist; jaxtyping would silently not check that annotation.
        typing.get_type_hints(function, include_extras=True)
        return jaxtyped(function, typechecker=beartype)

    @functools.wraps(function)
    def check(*arguments: Any, **options: Any) -> Any:
        return decorated()(*arguments, **options)

    return check


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Switches the checks off: for tests of the errors that production code itself raises for wrong shapes."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
