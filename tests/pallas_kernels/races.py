"""The verdict of the race detector of Pallas' TPU interpreter, which has no public name."""

from __future__ import annotations

import importlib

import jax

# Before 0.8, the interpreter is one module.
_MODULE = "jax._src.pallas.mosaic.interpret" + (".interpret_pallas_call" if jax.__version_info__ >= (0, 8) else "")


def races_found() -> bool | None:
    """Whether a race was found since the last reset of the interpreter; None if no kernel has run."""
    races = importlib.import_module(_MODULE).races
    return None if races is None else races.races_found
