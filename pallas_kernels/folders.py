"""Folders for what is kept between runs. Whatever is wrong with one costs a line in the log, never the run."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import platformdirs

_log = logging.getLogger(__name__)

ROOM = 16 * 2**20  # bytes that must be free: a compiled program or library takes up to a few MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that exists."""

    path: Path
    writable: bool


def cache_dir() -> Path:
    """Where this package keeps files: `$XDG_CACHE_HOME/pallas_kernels`, by default under ~/.cache on Linux."""
    return platformdirs.user_cache_path("pallas_kernels", appauthor=False)


@functools.cache
def settle(wanted: Path, contents: str, *, variable: str, reading: bool = True, private: bool = False) -> Folder | None:
    """The folder for `contents`: `wanted`, made if need be, or what comes next best where it cannot be written.

    With `reading` that is `wanted` itself if it exists, to be read only; else a folder of this user alone among the
    system's temporary files; else None. Says so in the log, once a process, and that the environment variable
    `variable` names another. `private`: what lies there is executed, so nobody else may be able to write it.
    """
    problem = _why_not_writable(wanted)
    if problem is None and private and not is_trusted(wanted):
        problem = "it is not this user's, or others may write to it"
    if problem is None:
        return Folder(path=wanted, writable=True)
    if reading and _has_files(wanted) and (is_trusted(wanted) or not private):
        found, instead = Folder(path=wanted, writable=False), "what it holds is used, and nothing is added"
    else:
        fallback = _temporary(wanted)
        found = None if fallback is None else Folder(path=fallback, writable=True)
        instead = "nothing is kept after this run" if fallback is None else f"{fallback} is used instead"
    _log.warning("%s cannot be kept in %s (%s): %s; %s names another folder", contents, wanted, problem, instead, variable)
    return found


def is_trusted(folder: Path) -> bool:
    """Whether nobody but this user and the administrator can write to an existing folder."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def replace_file(path: Path, contents: bytes) -> None:
    """Writes a file as a whole: whoever reads it meanwhile gets the old one or the new one, never half of it. OSError."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        scratch.write_bytes(contents)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _why_not_writable(folder: Path) -> str | None:
    """None if `folder`, which is made if need be, takes files; else the reason."""
    if str(folder).startswith("~"):
        return "this user has no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        disk = shutil.disk_usage(folder)
    except OSError as error:
        return str(error)
    if disk.total and disk.free < ROOM:
        return f"its disk is full: {disk.free / 2**20:.1f} MiB are free"
    return None


def _has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _temporary(wanted: Path) -> Path | None:
    """A folder to take the place of `wanted` until the machine is restarted; None if that cannot be had either."""
    try:
        root = Path(tempfile.gettempdir()) / f"user-cache-{os.getuid()}"
        root.mkdir(exist_ok=True, mode=0o700)
        status = root.lstat()  # anybody can make a folder there, or a link
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            return None
        # Two folders whose last parts agree must not become one.
        folder = root / "-".join(part.strip("/") for part in wanted.parts if part.strip("/"))
        return folder if _why_not_writable(folder) is None else None
    except OSError:
        return None
