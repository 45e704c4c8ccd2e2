"""A frozen keyword-only dataclass that JAX can look into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass and a pytree whose children are all of its fields."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, kw_only=True)(cls))
