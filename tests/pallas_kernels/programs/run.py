"""Runs a program of this folder in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).parents[3]


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts a process that runs `program`, a module of this folder, with additional environment variables."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-m", f"{__package__}.{program}", *arguments]
    return subprocess.Popen(
        command, cwd=_REPOSITORY, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(program: str, *arguments: str, **environment: str) -> str:
    """Returns the program's output; the test fails if the program does."""
    process = start(program, *arguments, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip()
