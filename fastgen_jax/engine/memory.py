"""How much memory a KV cache may use, chosen so that two starts on one machine get the same size.

The size is part of every compiled program's shape, and free memory differs from start to start. So a new choice is
rounded down to a few digits, and an earlier choice is kept while it fits the memory that is free now.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import psutil

HOST_SHARES = (0.25, 0.125, 0.5)  # of the host's free memory, which other programs need too
DEVICE_SHARES = (0.85, 0.75, 0.9)  # of an accelerator's memory; the rest is for activations and logits


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that a KV cache may take on a device, or on the host of CPU devices."""

    usual: int
    """For a new choice."""
    least: int
    """An earlier choice that takes less is replaced, because it would waste memory."""
    most: int
    """An earlier choice that takes more is replaced."""
    digits: int
    """Binary digits to which a new choice is rounded down."""

    def num_blocks(self, bytes_per_block: int, *, wanted: int, earlier: int | None = None, share: int = 1) -> int:
        """Blocks of the cache, at most `wanted`: as many as an `earlier` start had if that fits; 0 if there is no room.

        `share` is the number of devices over which a block is divided.
        """
        most, least, usual = (share * room // bytes_per_block for room in (self.most, self.least, self.usual))
        if earlier is not None and min(least, wanted) <= earlier <= min(most, wanted):
            return earlier
        return min(round_down(max(usual, 0), self.digits), wanted)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of an accelerator, or of the host that CPU devices share, in bytes."""

    limit: int
    """All that the device has, or all that this process can still allocate on the host."""
    in_use: int = 0
    """Of a device; 0 for a host."""
    is_host: bool = False

    def free(self, weights: int = 0) -> int:
        """Bytes that are left after `weights` more bytes are loaded; negative if they exceed it."""
        return self.limit - self.in_use - weights

    def room(self, weights: int = 0) -> Room:
        """Room for the cache after `weights` more bytes are loaded."""
        if self.is_host:
            usual, least, most = (int(share * self.free(weights)) for share in HOST_SHARES)
            return Room(usual=usual, least=least, most=most, digits=3)
        usual, least, most = (int(share * self.limit) - self.in_use - weights for share in DEVICE_SHARES)
        return Room(usual=usual, least=least, most=most, digits=6)  # less than 3% is lost


def memory_now(platform: str) -> Memory:
    """The memory of the first device if it reports its size, else of the host."""
    stats = jax.local_devices()[0].memory_stats() if platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return Memory(limit=stats["bytes_limit"], in_use=stats.get("bytes_in_use", 0))
    return Memory(limit=available(), is_host=True)


def round_down(number: int, digits: int) -> int:
    """The largest number up to `number` with zeros after its first binary `digits`."""
    shift = max(number.bit_length() - digits, 0)
    return number >> shift << shift


def available() -> int:
    """Bytes that this process can still allocate without swapping, within the machine and its control groups."""
    free, limit = psutil.virtual_memory().available, cgroup_room()
    return free if limit is None else min(free, limit)


def give_back() -> None:
    """Returns to the system what this process has freed: glibc would keep part of it for later allocations."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def cgroup_room(root: Path = Path("/")) -> int | None:
    """Bytes left to this process by the memory limits of the control groups it is in; None if there is no limit.

    The minimum along the path from its group to the root of the mount, since any group may have a limit. Files cached in
    memory count as free. `root` holds proc/ and the mounts that proc/self/mountinfo names.
    """
    rooms = [room for group, version in _groups(root) if (room := _room(group, version)) is not None]
    return max(min(rooms), 0) if rooms else None


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """Folders of the control groups that may limit memory, each with the version of its interface."""
    try:
        paths = dict(_memory_paths((root / "proc/self/cgroup").read_text()))
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in mounts:
        place, _, kind = line.partition(" - ")
        version = {"cgroup": 1, "cgroup2": 2}.get(kind.split()[0] if kind else "")
        if version not in paths or (version == 1 and "memory" not in kind.split()[-1].split(",")):
            continue
        shown, mount = place.split()[3:5]  # the group at the root of the mount, and the mount point
        inside = paths[version].removeprefix(shown.rstrip("/")).strip("/")
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:  # the process is outside its namespace
            parts = []
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(mount.strip("/"), *parts[:depth]), version


def _memory_paths(text: str) -> Iterator[tuple[int, str]]:
    """Version of the interface and path of the group, for the lines of proc/self/cgroup that concern memory."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _room(group: Path, version: int) -> int | None:
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(group / name)) is not None]
    used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if not limits or used is None:
        return None
    prefix = "" if version == 2 else "total_"  # including the groups below
    try:
        stats = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
        files = sum(int(stats.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        files = 0
    return min(limits) - used + files


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none, as for the limit "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
