"""Folders for files that are kept between runs. A problem with a folder is logged; it never stops the run."""

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
    """Returns the folder for `contents`: `wanted`, created if necessary, or a fallback if it is not writable.

    With `reading`, the first fallback is `wanted` itself, read-only, if it contains files. The next is a private folder
    among the system's temporary files, and the last is None. The fallback is logged once per process, together with the
    environment variable `variable` that selects another folder. `private` means that the files are executed, so no other
    user may be able to write to the folder.
    """
    problem = _why_not_writable(wanted)
    if problem is None and private and not is_trusted(wanted):
        problem = "it belongs to another user, or other users can write to it"
    if problem is None:
        return Folder(path=wanted, writable=True)
    if reading and _has_files(wanted) and (is_trusted(wanted) or not private):
        found, instead = Folder(path=wanted, writable=False), "its files are used, and nothing is added"
    else:
        fallback = _temporary(wanted)
        found = None if fallback is None else Folder(path=fallback, writable=True)
        instead = "nothing is kept after this run" if fallback is None else f"{fallback} is used instead"
    _log.warning("%s cannot be kept in %s (%s): %s; %s names another folder", contents, wanted, problem, instead, variable)
    return found


def is_trusted(folder: Path) -> bool:
    """Whether only this user and the administrator can write to an existing folder."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def replace_file(path: Path, contents: bytes) -> None:
    """Replaces a file atomically: concurrent readers get the old or the new contents, never a part. Raises OSError."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        scratch.write_bytes(contents)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _why_not_writable(folder: Path) -> str | None:
    """None if files can be written to `folder`, which is created if necessary; otherwise the reason."""
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
    """A replacement for `wanted` that lasts until the machine is restarted; None if there is none."""
    try:
        root = Path(tempfile.gettempdir()) / f"user-cache-{os.getuid()}"
        root.mkdir(exist_ok=True, mode=0o700)
        status = root.lstat()  # any user can create a folder or a link there
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            return None
        # Folders with the same name and different parents must stay separate.
        folder = root / "-".join(part.strip("/") for part in wanted.parts if part.strip("/"))
        return folder if _why_not_writable(folder) is None else None
    except OSError:
        return None
