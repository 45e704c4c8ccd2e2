"""Checks what is in the distributions of a folder: `python -m tests.packaging.wheel_contents dist`."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from pallas_kernels.native.isa import ISAS
from pallas_kernels.native.sources import SOURCES

PREBUILT = PurePosixPath("pallas_kernels/native/prebuilt")
# Kinds of files that belong into the packages; anything else would be there by mistake.
SUFFIXES = {".py", ".typed", ".cc", ".h", ".html", ".css", ".js", ".LICENSE", ".md", ".txtpb"}


def problems(wheel: Path) -> list[str]:
    """What is wrong with the contents of a wheel."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
        packages = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
        if packages != {"fastgen_jax", "pallas_kernels"}:
            found.append(f"top-level names are {sorted(packages)}")
        found += [f"{name} is not where a wheel's tag says" for name in names if name.parts[0].endswith(".data")][:1]
        prebuilt = [name for name in names if name.is_relative_to(PREBUILT)]
        rest = [name for name in names if name.parts[0] in packages and name not in prebuilt]
        found += [f"unexpected file {name}" for name in rest if name.suffix not in SUFFIXES]
        found += [
            f"{source.name} of {library} is missing"
            for library, source in SOURCES.items()
            if not any(str(name).endswith("/".join(source.parts[-2:])) for name in names)
        ]
        metadata = next(name for name in names if name.name == "WHEEL")
        pure = "Root-Is-Purelib: true" in archive.read(str(metadata)).decode()
        tag = wheel.stem.split("-")[-1]
        if tag == "any":
            found += [f"{name} in a wheel for every platform" for name in prebuilt]
            if not pure:
                found.append("a wheel for every platform is not pure")
            return found
        machine = "x86_64" if tag.endswith("x86_64") else "aarch64"
        wanted = {f"{name}.so" for name, isa in ISAS.items() if isa.machine == machine} | {"manifest.json"}
        if {name.name for name in prebuilt} != wanted:
            found.append(f"prebuilt files are {sorted(name.name for name in prebuilt)}, not {sorted(wanted)}")
        elif json.loads(archive.read(str(PREBUILT / "manifest.json")))["tag"] != tag:
            found.append(f"the tag {tag} is not that of the libraries")
        if pure:
            found.append("a wheel with libraries is declared pure")
    return found


def sdist_problems(sdist: Path) -> list[str]:
    """What an sdist lacks."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "pallas_kernels/native/common.h"}
    return [f"{name} is missing" for name in sorted(wanted - names)]


def main(folder: Path) -> int:
    """Prints the problems of all distributions, and returns the exit code."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    found = {path.name: problems(path) for path in wheels} | {path.name: sdist_problems(path) for path in sdists}
    for name, wrong in found.items():
        print(f"{name}: {'; '.join(wrong) or 'ok'}")
    return 1 if any(found.values()) or not wheels or not sdists else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
