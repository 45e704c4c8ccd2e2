"""What this machine is, how fast it multiplies and reads memory, and whether other programs disturb a measurement."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

PEAK_SECONDS = 0.6  # spent on each way to multiply; the best repetition counts
PEAK_SIZE = 1024  # rows and columns: 2.1 GFLOP per product, large enough for full speed and small enough for a cache
READ_SIZE = 8192  # rows and columns of the matrix that is read on a CPU: 256 MiB
ACCELERATOR_BYTES = 2**29  # of the array that is read and written on an accelerator
DISTURBED_CORES = 0.15  # above this, other programs used enough of the machine to change a figure


def describe() -> dict[str, str | int | float]:
    """Processor, cores this process may use, memory in GiB, and operating system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text(errors="replace").splitlines() if ":" in line)
        by_name = {key.strip(): value.strip() for key, value in fields.items()}
        name = by_name.get("model name", name)
        if "cpu family" in by_name:  # virtual machines often hide the exact name
            name += f" (family {by_name['cpu family']}, model {by_name.get('model')})"
    return {
        "cpu": name,
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul_peak(dtype: str = "float32") -> dict[str, float]:
    """Measured FLOP/s of a square matrix product of `dtype`, by library; loads JAX.

    "jax" is XLA on the default device. On a CPU "numpy" is added for float32, because its BLAS is often faster. The peak to
    compare with is the largest.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    flops = 2.0 * PEAK_SIZE**3
    on_cpu = jax.default_backend() == "cpu"
    # An accelerator needs a larger product to hide the dispatch.
    size = PEAK_SIZE if on_cpu else 8 * PEAK_SIZE
    a = jnp.ones((size, size), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    peaks = {"jax": flops * (size / PEAK_SIZE) ** 3 / _best_seconds(lambda: multiply(a, a).block_until_ready())}
    if on_cpu and dtype == "float32":
        b = np.ones((size, size), np.float32)
        peaks["numpy"] = flops / _best_seconds(lambda: b @ b)
    return peaks


def memory_peak() -> dict[str, float]:
    """Measured bytes per second from memory, by library; loads JAX.

    On a CPU a matrix that no cache holds is multiplied by a vector, which reads it once, as the generation of one token
    reads the weights; the rate to compare with is the largest. On an accelerator an array is read and written.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() != "cpu":
        ones = jnp.ones(ACCELERATOR_BYTES // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1)
        add(ones).block_until_ready()
        return {"jax": 2 * ones.nbytes / _best_seconds(lambda: add(ones).block_until_ready())}
    matrix, vector = np.ones((READ_SIZE, READ_SIZE), np.float32), np.ones(READ_SIZE, np.float32)
    a, x = jnp.asarray(matrix), jnp.asarray(vector)
    multiply = jax.jit(jnp.matmul)
    multiply(a, x).block_until_ready()
    return {
        "jax": matrix.nbytes / _best_seconds(lambda: multiply(a, x).block_until_ready()),
        "numpy": matrix.nbytes / _best_seconds(lambda: matrix @ vector),
    }


def _best_seconds(work: Callable[[], object]) -> float:
    best, deadline = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def busy_seconds(process_group: int | None = None) -> float:
    """CPU seconds used so far by the whole machine, or by one process group; 0 where there is no /proc."""
    ticks = os.sysconf("SC_CLK_TCK")
    try:
        if process_group is None:
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
                int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            )
            return (user + nice + system + irq + softirq) / ticks
    except OSError:
        return 0.0
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process may end while it is inspected
            # After the name in parentheses: state, parent, group, ..., user, system, and both of ended children.
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == process_group:
                total += sum(map(int, fields[11:15]))
    return total / ticks


class ForeignLoad:
    """Measures how many cores were busy with programs outside of `process_group` since this object was made."""

    def __init__(self, process_group: int) -> None:
        self._group = process_group
        self._busy, self._own, self._began = busy_seconds(), busy_seconds(process_group), time.perf_counter()

    def cores(self) -> float:
        """Cores kept busy by other programs on average; near 0, or the measurement cannot be trusted."""
        own = busy_seconds(self._group) - self._own
        foreign = busy_seconds() - self._busy - own
        return max(0.0, foreign / (time.perf_counter() - self._began))


def disturbance(foreign_cores: float) -> str:
    """A warning to append to the line of a run; empty if the engine had the machine to itself."""
    if foreign_cores < DISTURBED_CORES:
        return ""
    return f" -- disturbed: other programs kept {foreign_cores:.1f} cores busy"


@contextlib.contextmanager
def machine_lock(lock_file: Path | None, *, mode: Literal["shared", "exclusive"]) -> Iterator[None]:
    """Holds an advisory lock on `lock_file`, so that measurements on a shared machine do not overlap.

    Use "exclusive" for a measurement and "shared" for the work around it. None locks nothing.
    """
    if lock_file is None:
        yield
        return
    with lock_file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if mode == "exclusive" else fcntl.LOCK_SH)
        yield  # closing the file releases the lock
