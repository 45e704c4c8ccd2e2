"""Frozen keyword-only dataclasses that are JAX pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """A field of a `pytree` that is part of its structure, not a child: a hashable value, fixed when a program is traced."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass and a pytree whose children are all fields that are not `static`."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))
