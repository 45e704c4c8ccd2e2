"""Functions with declared shapes, for the tests of the shape checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Array, Float


def weighted(x: Float[Array, "T E"], weight: Float[Array, " E"]) -> Float[Array, "T E"]:
    return x * weight[None, :]


def first_rows(x: Float[Array, "T E"]) -> Float[Array, "T E"]:
    return x[:1]


@jax.custom_jvp
def doubled(x: Float[Array, " T"]) -> Float[Array, " T"]:
    return 2 * x


@doubled.defjvp
def _doubled_jvp(primals: Any, tangents: Any) -> Any:
    return doubled(primals[0]), 2 * tangents[0]


def plain(x: int) -> int:
    return x


def with_a_missing_name(x: Float[Array, " T"], options: Mapping[str, int]) -> Float[Array, " T"]:
    return x
