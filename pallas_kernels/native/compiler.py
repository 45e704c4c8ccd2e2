"""Finds a C++ compiler and its flags for this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jaxlib.version

from pallas_kernels.native import isa

# contract=fast: a * b + c becomes one fused instruction, in all kernels alike. No flag here lets sums be reordered.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-w",
)
_PROBE_TIMEOUT_S = 60
_COMPILE_TIMEOUT_S = 600

_running: set[subprocess.Popen[str]] = set()


class CompilerError(RuntimeError):
    """There is no working compiler; the message lists what was tried."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """A working C++ compiler, and the flags for this machine."""

    command: tuple[str, ...]
    flags: tuple[str, ...]
    version: str

    def key(self, sources: bytes) -> str:
        """Digest of everything that determines the machine code: sources, flags, compiler, CPU, jaxlib's headers."""
        parts = (*self.command, *self.flags, self.version, cpu_description(), jaxlib.version.__version__)
        return hashlib.sha256("\0".join(parts).encode() + b"\0" + sources).hexdigest()[:32]

    def compile(self, source: Path, output: Path, *, include: Sequence[Path]) -> None:
        """Writes the shared library `output`. Raises `CompilerError` with the end of the compiler's output."""
        directories = [f"-I{directory}" for directory in include]
        command = [*self.command, *self.flags, *directories, str(source), "-o", str(output)]
        # In a session of its own, with the processes that it starts, so that all of them can be ended together.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        _running.add(process)
        try:
            printed, _ = process.communicate(timeout=_COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _end(process)
            raise CompilerError(f"{shlex.join(command)} took more than {_COMPILE_TIMEOUT_S} s") from None
        finally:
            _running.discard(process)
        if process.returncode != 0:
            raise CompilerError(f"{shlex.join(command)} failed:\n{printed[-2000:]}")


def end_all() -> None:
    """Ends the compilers that are running; `compile` then raises `CompilerError`."""
    for process in tuple(_running):
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_compiler() -> Compiler:
    """The first of $CXX, c++, g++, clang++ and `python -m ziglang c++` that builds a library for this CPU.

    The environment variable PALLAS_KERNELS_ISA selects another instruction set than the best. Raises `CompilerError` when
    there is no compiler, and `ValueError` if the variable does not fit the CPU.
    """
    if sys.platform not in ("linux", "darwin"):
        raise CompilerError(f"native kernels are built on Linux and macOS, not on {sys.platform!r}")
    tried = []
    for command in _candidates():
        for machine_flags in _machine_flags():
            flags = (*FLAGS, *machine_flags)
            problem = _try(command, flags)
            if problem is None:
                version = _run([*command, "--version"], timeout=_PROBE_TIMEOUT_S).stdout
                return Compiler(command=command, flags=flags, version=version)
            tried.append(f"{shlex.join([*command, *machine_flags])}: {problem}")
    remedy = "install g++ or clang++, or `pip install ziglang`"
    raise CompilerError(f"no C++ compiler works ({'; '.join(tried) or 'none found'}); {remedy}")


def cpu_description() -> str:
    """Model and instruction sets of this CPU: what `-march=native` depends on."""
    if sys.platform == "darwin":
        model = _run(["sysctl", "-n", "machdep.cpu.brand_string"], timeout=_PROBE_TIMEOUT_S).stdout
        return f"{platform.machine()} {model.strip()}"
    wanted = ("model name", "cpu family", "model\t", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _candidates() -> list[tuple[str, ...]]:
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [tuple(named)] if named else []
    commands += [(path,) for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        commands.append((sys.executable, "-m", "ziglang", "c++"))
    return commands


def _machine_flags() -> tuple[tuple[str, ...], ...]:
    """Flags that select this CPU's instruction set, or the one that the user wants, best first."""
    name = isa.chosen() if isa.wanted() else None
    if name is not None:
        return (isa.ISAS[name].flags,)
    if platform.machine() in ("x86_64", "AMD64"):
        # Clang would split 64-byte vectors in two on some CPUs, and then run out of registers.
        return ("-march=native", "-mprefer-vector-width=512"), ("-march=native",)
    # On Arm -mcpu selects the instruction set and the tuning, -march only the former.
    return ("-mcpu=native",), ("-march=native",)


def _try(command: tuple[str, ...], flags: tuple[str, ...]) -> str | None:
    """None if the compiler accepts the flags and has a C++ standard library, otherwise its error message."""
    # Preprocessing takes a few hundredths of a second; a missing linker is noticed only when a kernel is built.
    arguments = [*command, *flags, "-E", "-x", "c++", "-"]
    result = _run(arguments, timeout=_PROBE_TIMEOUT_S, text="#include <atomic>\n")
    if result.returncode == 0:
        return None
    return result.stdout.strip()[-300:] or f"exit status {result.returncode}"


def _run(command: Sequence[str], *, timeout: float, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command, with its output and errors together in `stdout`. One that cannot start or hangs counts as failed."""
    try:
        return subprocess.run(
            command,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=1, stdout=str(error))
