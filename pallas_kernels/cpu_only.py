"""A mark in a program that can only run on a CPU."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NoReturn

from jax.interpreters import mlir

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped


def cpu_only(x: Shaped[Array, "*shape"], *, what: str) -> Shaped[Array, "*shape"]:
    """Returns `x`; lowering it for another platform raises a ValueError.

    `what` is the beginning of its message: what has a layout for the CPU, such as "a PackedWeight was".
    """
    return _primitive().bind(x, what=what)


@functools.cache
def _primitive() -> Any:
    # Not above: Pallas comes with it, which takes 0.1 s to import. A start with saved programs traces nothing.
    from jax.extend.core import Primitive

    primitive = Primitive("cpu_only")
    primitive.def_abstract_eval(lambda x, *, what: x)
    mlir.register_lowering(primitive, lambda context, x, *, what: [x], platform="cpu")
    mlir.register_lowering(primitive, _refuse)
    return primitive


def _refuse(context: mlir.LoweringRuleContext, x: mlir.Value, *, what: str) -> NoReturn:
    platforms = ", ".join(context.module_context.platforms)
    raise ValueError(
        f"{what} lowered for platform {platforms!r}, but the layout is only for 'cpu'; "
        f"call prepare(w, platform={platforms!r}) on the original weights"
    )
