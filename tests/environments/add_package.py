"""Installs this package into the environment that runs it, and fails if that changes a package that was there.

    .venv-colab/bin/python -m tests.environments.add_package '.[serve,bench]'

pip is called as a user would call it, without constraints.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = "fastgen_jax"


def versions() -> dict[str, str]:
    """Version of each installed package except this one."""
    return {package.name: package.version for package in metadata.distributions() if package.name != OURS}


def main(what: str) -> int:
    before = versions()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", what]
    subprocess.run(command, check=True, cwd=ROOT)
    after = versions()
    print("added:", ", ".join(f"{name} {after[name]}" for name in sorted(after.keys() - before.keys())) or "nothing")
    changed = [f"{name} {old} -> {after.get(name, 'removed')}" for name, old in before.items() if after.get(name) != old]
    for line in sorted(changed):
        print("changed:", line)
    print(f"{len(before) - len(changed)} packages as they were, {len(changed)} changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
