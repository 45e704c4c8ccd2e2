"""Compiles the kernels of all instruction sets of a platform with Zig, for a wheel.

    python -m pallas_kernels.native.prebuild --machine x86_64 --out FOLDER

The libraries run with the glibc of `GLIBC` and newer, whichever system they are built on. They are bound to the headers of
the installed jaxlib, and work with it and later ones; so build with the oldest jaxlib that is supported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from pallas_kernels.native.compiler import FLAGS
from pallas_kernels.native.isa import ISAS
from pallas_kernels.native.prebuilt import MANIFEST, ffi_version
from pallas_kernels.native.sources import HEADERS, SOURCES, digest

GLIBC = "2.28"  # jaxlib requires 2.27; 2.28 is the version that PyPI's tags and most distributions have


def build(machine: str, out: Path) -> list[Path]:
    """Writes one library per instruction set of `machine`, and the manifest, to the folder `out`, and returns their paths.

    Raises:
      ValueError: there is no instruction set for the machine.
      subprocess.CalledProcessError: a compiler failed; its messages were printed.
    """
    names = [name for name, isa in ISAS.items() if isa.machine == machine]
    if not names:
        machines = ", ".join(sorted({repr(isa.machine) for isa in ISAS.values()}))
        raise ValueError(f"machine is {machine!r}, but must be one of {machines}")
    include = _include()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as scratch:
        objects = {
            name: [
                pool.submit(_compile, machine, ISAS[name].zig, source, Path(scratch) / f"{name}-{library}.o", include)
                for library, source in SOURCES.items()
            ]
            for name in names
        }
        libraries = {name: out / f"{name}.so" for name in names}
        for name, parts in objects.items():
            # Without a CPU: the C++ library, which Zig compiles the first time, is then the same for all of them.
            _zig(machine, "-O3", "-shared", "-s", *(part.result() for part in parts), "-o", libraries[name])
    manifest = {
        "system": f"linux {machine}",
        "tag": f"manylinux_{GLIBC.replace('.', '_')}_{machine}",
        "ffi": ffi_version(include),
        "sources": digest(),
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in libraries.items()},
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return [*libraries.values(), out / MANIFEST]


def _compile(machine: str, cpu: str, source: Path, output: Path, include: Path) -> Path:
    flags = [flag for flag in FLAGS if flag != "-shared"]
    if machine == "x86_64":
        flags.append("-mprefer-vector-width=512")
    hidden = ("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-rtti")
    _zig(machine, cpu, *flags, *hidden, f"-I{HEADERS}", f"-I{include}", "-c", source, "-o", output)
    return output


def _zig(machine: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.{GLIBC}", *map(str, arguments)]
    print(shlex.join(command[2:]), file=sys.stderr)
    subprocess.run(command, check=True)


def _include() -> Path:
    """The headers of the installed jaxlib."""
    spec = find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("jaxlib is not installed; its headers are required")
    return Path(spec.origin).parent / "include"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compiles the C++ kernels of a platform for a wheel.")
    parser.add_argument("--machine", required=True, choices=sorted({isa.machine for isa in ISAS.values()}))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for path in build(options.machine, options.out):
        print(f"{path}  {path.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
