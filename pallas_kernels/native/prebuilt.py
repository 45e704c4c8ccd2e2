"""Kernels that were compiled when the package was built: one library per instruction set, which has all kernels.

The folder `prebuilt` beside this file exists only in some wheels, see `prebuild`. A library that does not fit this process
is refused; kernels are then compiled here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import sys
from pathlib import Path

from pallas_kernels.native import isa
from pallas_kernels.native.sources import digest

FOLDER = Path(__file__).parent / "prebuilt"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prebuilt:
    """A library that fits this CPU and this version of XLA."""

    path: Path
    isa: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is none.

    Attributes:
      reason: one sentence.
      expected: nothing is wrong: this installation has none, or the user does not want it.
    """

    reason: str
    expected: bool


def find(folder: Path, include: Path) -> Prebuilt | Refusal:
    """The best library of a folder.

    Args:
      folder: usually `FOLDER`.
      include: where "xla/ffi/api/c_api.h" of the installed jaxlib lies.

    Raises:
      ValueError: the environment variable PALLAS_KERNELS_ISA does not fit the CPU.
    """
    name = isa.chosen()
    if name is None:
        return Refusal(reason=f"{isa.VARIABLE} or this kind of CPU requires that kernels are compiled here", expected=True)
    if not (folder / MANIFEST).exists():
        return Refusal(reason="this installation has no prebuilt kernels", expected=True)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        problem = _problem(manifest, folder, name, ffi_version(include))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{folder / MANIFEST} cannot be used ({error!r})"
    if problem is not None:
        return Refusal(reason=problem, expected=False)
    return Prebuilt(path=folder / f"{name}.so", isa=name)


def _problem(manifest: dict, folder: Path, name: str, installed: tuple[int, int]) -> str | None:
    """Why the library for the instruction set `name` does not fit, if so."""
    system = f"{sys.platform} {platform.machine()}"
    if manifest["system"] != system:
        return f"the prebuilt kernels are for {manifest['system']}, but this is {system}"
    major, minor = manifest["ffi"]
    # XLA accepts handlers of earlier minor versions, for at least a year, and not those of later ones.
    if major != installed[0] or minor > installed[1]:
        installed_name = ".".join(map(str, installed))
        return f"the prebuilt kernels require XLA FFI {major}.{minor}, but this jaxlib has {installed_name}"
    if manifest["sources"] != digest():
        return "the sources of the kernels have changed since the prebuilt ones were compiled"
    if name not in manifest["sha256"]:
        return f"there is no prebuilt library for {name}"
    path = folder / f"{name}.so"
    # Opening a truncated library would crash the process.
    if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["sha256"][name]:
        return f"the prebuilt library {path} is damaged; reinstall the package"
    return None


def ffi_version(include: Path) -> tuple[int, int]:
    """(major, minor) of XLA's interface for custom calls, as declared by a jaxlib's header. Raises OSError, ValueError."""
    text = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    found = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise ValueError("the header of jaxlib declares no version of XLA FFI")
    return int(found[0][1]), int(found[1][1])
