"""Instruction sets that kernels are compiled for, and which of them a CPU has."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Collection
from pathlib import Path

VARIABLE = "PALLAS_KERNELS_ISA"
NATIVE = "native"  # a value of the variable: compile for this very CPU, never use a prebuilt library


@dataclasses.dataclass(frozen=True, kw_only=True)
class Isa:
    """An instruction set.

    Attributes:
      machine: value of `platform.machine()`.
      needs: names in the lines "flags" or "Features" of /proc/cpuinfo.
      flags: options of GCC and Clang.
      zig: the same as an option of `zig c++`, which spells names of CPUs differently.
    """

    machine: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    zig: str


# x86-64-v3 and -v4 by their names in /proc/cpuinfo; "abm" stands for LZCNT.
_AVX2 = frozenset(
    ["cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"]
)
_AVX512 = _AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_WIDE = "-mprefer-vector-width=512"  # Clang would split 64-byte vectors in two on some CPUs, and then run out of registers

# Best first. The kernels have no instructions of their own for Arm's dot products or bfloat16, so one entry serves there.
ISAS = {
    "avx512_bf16": Isa(
        machine="x86_64",
        needs=_AVX512 | {"avx512_bf16"},
        flags=("-march=x86-64-v4", "-mavx512bf16", _WIDE),
        zig="-mcpu=x86_64_v4+avx512bf16",
    ),
    "avx512": Isa(machine="x86_64", needs=_AVX512, flags=("-march=x86-64-v4", _WIDE), zig="-mcpu=x86_64_v4"),
    "avx2": Isa(machine="x86_64", needs=_AVX2, flags=("-march=x86-64-v3",), zig="-mcpu=x86_64_v3"),
    "neon": Isa(machine="aarch64", needs=frozenset({"asimd"}), flags=("-march=armv8-a",), zig="-mcpu=generic"),
}


def supported(machine: str, cpu_flags: Collection[str]) -> tuple[str, ...]:
    """The keys of `ISAS` that a CPU has, best first."""
    return tuple(name for name, isa in ISAS.items() if isa.machine == machine and isa.needs <= set(cpu_flags))


def choose(wanted: str | None, machine: str, cpu_flags: Collection[str]) -> str | None:
    """The instruction set to use: `wanted`, or the best that the CPU has; None if there is none or `wanted` is "native".

    Raises:
      ValueError: `wanted` is unknown, or the CPU does not have it.
    """
    names = supported(machine, cpu_flags)
    if wanted == NATIVE:
        return None
    if wanted is None:
        return names[0] if names else None
    if wanted not in names:
        missing = sorted(ISAS[wanted].needs - set(cpu_flags)) if wanted in ISAS else []
        reason = f"this CPU ({machine}) has no {', '.join(missing)}" if missing else f"this CPU ({machine}) has others"
        possible = ", ".join(map(repr, (*names, NATIVE)))
        raise ValueError(f"{VARIABLE} is {wanted!r}, but {reason}; it can be {possible} here, or unset for the best")
    return wanted


def wanted() -> str | None:
    """The value of the environment variable; None if it is unset or empty."""
    return os.environ.get(VARIABLE) or None


def chosen() -> str | None:
    """`choose` for this process and CPU. Raises `ValueError` if the environment variable does not fit the CPU."""
    return choose(wanted(), platform.machine(), cpu_flags())


def cpu_flags() -> frozenset[str]:
    """What this CPU can do, in the words of /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
