"""Installs a built wheel into a new environment for each Python that is here, with one line of pip, and generates text.

    python -m tests.packaging.install_check dist [python3.11 python3.12 ...]

The generation runs without any compiler in PATH, so the wheel's own kernels are used where it has them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PROGRAM = Path(__file__).parent / "programs" / "generate.py"
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def check(python: str, wheels: Path) -> str:
    """Installs and generates with one interpreter; one line about it. Raises `CalledProcessError` if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        binaries = Path(folder) / "bin"
        start = time.monotonic()
        # Where only a local wheel may be used, its dependencies still come from the usual index.
        pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--pre"]
        subprocess.run([*pip, "--find-links", wheels, "fastgen_jax"], check=True)
        installed = time.monotonic() - start
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "PALLAS_KERNELS_ISA")
        }
        environment |= {"PATH": str(binaries), "XDG_CACHE_HOME": str(Path(folder) / "cache"), "JAX_PLATFORMS": "cpu"}
        version = subprocess.run(
            [binaries / "fastgen", "--version"], check=True, capture_output=True, text=True, env=environment, cwd=folder
        )
        start = time.monotonic()
        printed = subprocess.run(
            [binaries / "python", _PROGRAM, _ROOT / "checkpoints" / "sotu-1m"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        ).stdout
        generated = time.monotonic() - start
    return f"{version.stdout.strip()}; installed in {installed:.0f} s, answered in {generated:.0f} s; {printed.strip()}"


def main() -> int:
    """Prints a line per interpreter, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Installs a wheel in new environments and generates text.")
    parser.add_argument("wheels", type=Path)
    parser.add_argument("pythons", nargs="*", help="default: python3.11 to python3.14, those that are installed")
    options = parser.parse_args()
    pythons = options.pythons or [path for version in VERSIONS if (path := shutil.which(f"python{version}"))]
    if not pythons:
        print("no Python is installed that could be tried", file=sys.stderr)
        return 1
    failed = False
    for python in pythons:
        try:
            print(f"{python}: {check(python, options.wheels.resolve())}", flush=True)
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{python}: FAILED: {error}\n{error.stderr or ''}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
