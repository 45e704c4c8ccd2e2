"""The machine: processor, memory, limits of its container, accelerators that the operating system knows, variables."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import psutil

from fastgen_jax.cli.doctor.finding import Finding, Problem, size

LEAST_MEMORY = 2**30  # a model of 135M parameters in float32 needs this, with its programs
NVIDIA_SMI_SECONDS = 20
# Instruction sets that the kernels or XLA use, as Linux calls them.
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
VARIABLES = re.compile(
    r"(FASTGEN|PALLAS_KERNELS|JAX|XLA|TPU|LIBTPU|XDG|OMP|OPENBLAS)_\w+|(CUDA|HF)_\w+|CXX|LD_LIBRARY_PATH|TMPDIR|TF_CPP_MIN_LOG_LEVEL"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
# The ids of Google's PCI devices that are TPUs; the same vendor makes network cards and disks.
GOOGLE = "0x1ae0"
TPU_DEVICES = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU7x",
}


def machine(root: Path = Path("/")) -> Finding:
    """Operating system, processor, memory, and the limits of the container; problems where one is too small."""
    cpu, sets = processor(root)
    cores, quota = usable_cores(), cpu_quota(root)
    memory = psutil.virtual_memory()
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cores": cores,
        "cpu_quota": quota,
        "instruction_sets": sets,
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "accelerators": accelerators(root),
    }
    limit = "" if quota is None else f"; the container may use the time of {quota:g}"
    lines = [
        ("system", facts["system"]),
        ("cpu", cpu),
        ("cores", f"{cores} usable of {os.cpu_count()}{limit}"),
        ("instruction sets", " ".join(sets) or "unknown"),
        ("memory", f"{size(memory.available)} free of {size(memory.total)}"),
        ("accelerators", ", ".join(facts["accelerators"]) or "none found by the operating system"),
    ]
    problems = []
    if quota is not None and quota < 0.9 * cores:
        problems.append(
            Problem(
                f"the container sees {cores} cores but may use the time of only {quota:g}, so threads wait for each other",
                f"start the program with `taskset -c 0-{max(0, int(quota) - 1)}`, or the container with as many cores as "
                f"CPU time (docker: --cpuset-cpus)",
            )
        )
    if memory.available < LEAST_MEMORY:
        problems.append(
            Problem(
                f"only {size(memory.available)} of memory are free",
                'close other programs, or use a smaller model or quantize="int8"',
            )
        )
    return Finding(facts=facts, lines=lines, problems=problems)


def processor(root: Path = Path("/")) -> tuple[str, list[str]]:
    """The processor's name and those of its instruction sets that matter here."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, [flag for flag in INSTRUCTION_SETS if flag in flags]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores whose time the control group at the top of this container may use; None without a limit."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = root / "sys/fs/cgroup/cpu"
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None


def accelerators(root: Path = Path("/")) -> list[str]:
    """The accelerators that the operating system sees, whether or not JAX can use them."""
    return [*gpus(root), *tpus(root)]


def gpus(root: Path = Path("/")) -> list[str]:
    """NVIDIA GPUs with driver version and memory."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    if not lines and (version := driver_version(root)):
        devices = sorted((root / "dev").glob("nvidia[0-9]*"))
        lines = [f"NVIDIA GPU, driver {version}"] * len(devices)
    return lines


def driver_version(root: Path = Path("/")) -> str | None:
    """The version of the loaded NVIDIA driver; None if there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def tpus(root: Path = Path("/")) -> list[str]:
    """TPU chips on the PCI bus."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == GOOGLE and kind in TPU_DEVICES:
            found.append(TPU_DEVICES[kind])
    return found


def tpu_users(root: Path = Path("/")) -> list[tuple[int, str]]:
    """Process id and name of the other processes of this user that hold a TPU open."""
    found = []
    for folder in (root / "proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            held = any(_is_tpu(os.readlink(link)) for link in (folder / "fd").iterdir())
            name = (folder / "comm").read_text().strip() if held else ""
        except OSError:  # it has ended, or belongs to another user
            continue
        if held and pid != os.getpid():
            found.append((pid, name))
    return sorted(found)


def _is_tpu(path: str) -> bool:
    return re.fullmatch(r"/dev/(accel|vfio/)\d+", path) is not None


def variables() -> Finding:
    """The environment variables that change how this package, JAX or the model hub behave; secrets are masked."""
    shown = {
        name: "(set, not shown)" if SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if VARIABLES.fullmatch(name)
    }
    lines = list(shown.items()) or [("", "none of the variables that matter is set")]
    return Finding(facts=shown, lines=lines, problems=_of_variables(shown))


def _of_variables(shown: dict[str, str]) -> list[Problem]:
    if shown.get("JAX_ENABLE_X64", "0").lower() in ("1", "true"):
        what = "JAX_ENABLE_X64 is set, which makes numbers twice as large and kernels reject them"
        return [Problem(what, "unset JAX_ENABLE_X64")]
    return []
