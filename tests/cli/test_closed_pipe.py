"""Commands whose output is not read to the end."""

from __future__ import annotations

import subprocess
import sys


def test_a_command_ends_quietly_when_its_reader_closes_the_pipe() -> None:
    command = [sys.executable, "-m", "fastgen_jax.cli", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # the command still imports its modules, so it has written nothing yet
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")
