"""What a chat template reads from a conversation, found in its syntax tree."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes

_OF_ITEMS = ("selectattr", "rejectattr", "map")  # filters that take the parts of a content


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The forms of a conversation that a template can read."""

    iterates_content: bool
    """Whether it loops over the parts of a content, which is then a list."""
    tests_for_text: bool
    """Whether it also tests if a content is a string."""
    fields: frozenset[str]
    """Names of the fields that it reads, of messages and of other objects."""
    variables: frozenset[str]
    """Variables that it reads and does not set itself, such as "tools" or "enable_thinking"."""
    part_types: frozenset[str]
    """Values with which it compares the "type" of something, such as a part of a content."""


@functools.lru_cache(maxsize=32)
def traits_of(template: str, environment: jinja2.Environment) -> Traits:
    """The traits of a template that `environment` can parse; raises jinja2's TemplateSyntaxError otherwise."""
    from jinja2 import meta, nodes

    tree = environment.parse(template)
    names = _names_of_contents(tree)
    compared = [
        value
        for compare in tree.find_all(nodes.Compare)
        if _field(compare.expr) == "type"
        for operand in compare.ops
        for value in operand.find_all(nodes.Const)
    ]
    return Traits(
        iterates_content=any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
        or any(_is_content(step.node, names) for step in tree.find_all(nodes.Filter) if step.name in _OF_ITEMS),
        tests_for_text=any(test.name in ("string", "iterable", "sequence") for test in tree.find_all(nodes.Test)),
        fields=frozenset(_fields(tree)),
        variables=frozenset(meta.find_undeclared_variables(tree)),
        part_types=frozenset(value.value for value in compared if isinstance(value.value, str)),
    )


def _field(node: nodes.Node) -> str | None:
    """The name in `message.name`, `message["name"]` or `message.get("name")`; None for another expression."""
    from jinja2 import nodes

    match node:
        case nodes.Getattr():
            return node.attr
        case nodes.Getitem(arg=nodes.Const(value=str() as name)):
            return name
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=str() as name), *_]):
            return name
    return None


def _fields(tree: nodes.Template) -> Iterator[str]:
    from jinja2 import nodes

    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Call)):
        if (name := _field(node)) is not None:
            yield name
    for compare in tree.find_all(nodes.Compare):  # "name" in message
        if isinstance(compare.expr, nodes.Const) and isinstance(compare.expr.value, str):
            yield compare.expr.value


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is the content of a message, or parts of it; `names` are variables that hold one."""
    from jinja2 import nodes

    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Filter():
            return _is_content(node.node, names)
        case nodes.Getitem(arg=nodes.Slice()):
            return _is_content(node.node, names)
        case nodes.Or():
            return _is_content(node.left, names)
        case nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
        case nodes.Node():
            return _field(node) == "content"
    return False


def _names_of_contents(tree: nodes.Template) -> set[str]:
    """Variables to which a content is assigned, and parameters of macros that are called with one."""
    from jinja2 import nodes

    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    before = -1
    while len(names) > before:
        before = len(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is None:
                continue
            given = [(parameter.name, value) for parameter, value in zip(macro.args, call.args, strict=False)]
            given += [(pair.key, pair.value) for pair in call.kwargs]
            names.update(name for name, value in given if _is_content(value, names))
    return names
