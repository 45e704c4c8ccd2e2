"""Installed packages that do not fit together, found without starting JAX's devices.

An installation that raises jax but leaves the plugin of an accelerator behind does not fail: JAX ignores the plugin and
runs on the CPU. A notebook in which jax was replaced goes on with the old one until it is restarted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:  # imported where there is something to compare, since `packaging` takes a while
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

log = logging.getLogger(__name__)

ACCELERATORS = ("tpu", "cuda12", "cuda13")
"""Extras of jax, and of this package, that install what JAX needs for an accelerator."""

_PACKAGES = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}
_PJRT = {"cuda12": "jax-cuda12-pjrt", "cuda13": "jax-cuda13-pjrt"}
_OTHERS = ("jax", "jaxlib", "flax")
# NVIDIA's oldest drivers for user space of CUDA 12 and of CUDA 13.
_MIN_DRIVER = {"cuda12": 525, "cuda13": 580}
_FLAX_FOR_NEW_JAX = ("0.11.1", "0.12.9")  # from this jax on, flax.nnx needs this flax
_GOOGLE = "0x1ae0"  # vendor of PCI devices
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2 and v3 to TPU7x, as in JAX


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What `problems_of` judges."""

    loaded_jax: str
    """Version of the jax that this process has imported."""
    installed: Mapping[str, str]
    """Version of each installed package among those that must fit together."""
    required: tuple[str, ...]
    """The requirements of the installed jax, as in its metadata."""
    nvidia_driver: str | None
    """Version of the NVIDIA driver; None if there is none."""
    has_tpu: bool
    """Whether this machine has a TPU."""

    @property
    def jax(self) -> str:
        """Version of the installed jax."""
        return self.installed.get("jax", self.loaded_jax)


def environment_problems() -> list[str]:
    """What is wrong with the installed packages, each with its remedy; empty if nothing is. Starts no devices."""
    return problems_of(this_environment())


def this_environment() -> Environment:
    """The packages and accelerators of this machine."""
    installed = {}
    for name in (*_OTHERS, *_PACKAGES.values(), *_PJRT.values()):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        loaded_jax=jax.__version__,
        installed=installed,
        required=tuple(metadata.requires("jax") or ()) if "jax" in installed else (),
        nvidia_driver=_nvidia_driver(),
        has_tpu=_has_tpu(),
    )


@functools.cache
def warn_about_accelerators() -> None:
    """Logs, once, why JAX runs on the CPU of a machine that has an accelerator, unless JAX was told to use the CPU."""
    if jax.default_backend() == "cpu" and not getattr(jax.config, "jax_platforms"):  # noqa: B009 (defined at run time)
        for problem in accelerator_problems(this_environment()):
            log.warning("%s", problem)


def problems_of(environment: Environment) -> list[str]:
    """The problems of an environment, each with its remedy."""
    jax_version, flax_version = environment.jax, environment.installed.get("flax")
    if jax_version != environment.loaded_jax:
        return [
            f"this process has loaded jax {environment.loaded_jax} but jax {jax_version} is installed now: "
            "restart the session (in Colab: Runtime > Restart session)"
        ]
    problems = accelerator_problems(environment)
    new_jax, new_flax = _FLAX_FOR_NEW_JAX
    if flax_version is not None and not _is_older(jax_version, new_jax) and _is_older(flax_version, new_flax):
        problems.append(
            f"flax.nnx of flax {flax_version} cannot be imported with jax {jax_version}: "
            f"pip install 'flax>={new_flax}', then restart the session"
        )
    return problems


def accelerator_problems(environment: Environment) -> list[str]:
    """Why JAX cannot use an accelerator or its plugin, each with its remedy."""
    installed, jax_version = environment.installed, environment.jax
    problems = []
    for extra in ACCELERATORS:
        problems += _plugin_problems(environment, extra, jax_version)
    if environment.nvidia_driver and not any(_PACKAGES[extra] in installed for extra in _MIN_DRIVER):
        extra = "cuda13" if _major(environment.nvidia_driver) >= _MIN_DRIVER["cuda13"] else "cuda12"
        problems.append(
            f"this machine has an NVIDIA GPU (driver {environment.nvidia_driver}) but JAX has no plugin for it and runs on "
            f"the CPU: {_install(extra, jax_version)}"
        )
    if environment.has_tpu and "libtpu" not in installed:
        problems.append(f"this machine has a TPU but libtpu is not installed: {_install('tpu', jax_version)}")
    return problems


def _plugin_problems(environment: Environment, extra: str, jax_version: str) -> list[str]:
    package, installed = _PACKAGES[extra], environment.installed
    if package not in installed:
        return []
    problems = []
    wanted = _required(environment.required, package, extra)
    if wanted is not None and not _fits(installed[package], wanted.specifier):
        problems.append(
            f"{package} {installed[package]} does not fit jax {jax_version}, which needs {wanted.specifier}; JAX may ignore "
            f"it and run on the CPU: {_install(extra, jax_version)}"
        )
    elif extra in _PJRT and installed.get(_PJRT[extra]) != installed[package]:
        found = installed.get(_PJRT[extra])
        found = f"{_PJRT[extra]} is {found}" if found else f"{_PJRT[extra]} is not installed"
        problems.append(f"{package} is {installed[package]} but {found}: {_install(extra, jax_version)}")
    driver, minimum = environment.nvidia_driver, _MIN_DRIVER.get(extra)
    if driver and minimum and _major(driver) < minimum:
        other = f"pip uninstall -y {package} {_PJRT[extra]}, then "
        remedy = f"{other}{_install('cuda12', jax_version)}" if extra == "cuda13" else "install a newer driver"
        problems.append(f"{package} needs an NVIDIA driver {minimum} or newer but this is {driver}: {remedy}")
    return problems


def _is_older(version: str, other: str) -> bool:
    from packaging.version import Version

    return Version(version) < Version(other)


def _fits(version: str, wanted: SpecifierSet) -> bool:
    """Whether the version is one that jax asks for, or of libtpu one that is up to two releases older.

    Colab has libtpu 0.0.21.1 beside jax 0.7.2, which asks for 0.0.23.
    """
    from packaging.version import Version

    *most, last = Version(version).release[:3]
    newer = [".".join(map(str, (*most, last + more))) for more in range(3 if most == [0, 0] else 1)]
    return any(wanted.contains(candidate, prereleases=True) for candidate in (version, *newer))


def _required(required: tuple[str, ...], package: str, extra: str) -> Requirement | None:
    from packaging.requirements import Requirement

    for line in required:
        requirement = Requirement(line)
        if requirement.name == package and requirement.marker and requirement.marker.evaluate({"extra": extra}):
            return requirement
    return None


def _install(extra: str, jax_version: str) -> str:
    return f"pip install 'jax[{extra}]=={jax_version}', then restart the session"


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _nvidia_driver() -> str | None:
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.exists() else None


def _has_tpu() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text().strip() == _GOOGLE and (vendor.parent / "device").read_text().strip() in _TPUS:
            return True
    return False
