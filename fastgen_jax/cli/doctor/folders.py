"""The folders that are kept between runs: where they are, how large, and whether they can be used."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastgen_jax import paths
from fastgen_jax.cli.doctor.finding import Finding, Problem, size
from pallas_kernels import folders

LEAST_DISK = 2**30  # a small model and the programs for it
NATIVE = "C++ kernels"


class Kept(NamedTuple):
    """A folder, and the environment variable that moves it."""

    what: str
    path: Path
    variable: str


def caches() -> Finding:
    """Each folder with its size and whether it can be written; problems where one cannot."""
    facts, lines, problems = {}, [], []
    for kept in places():
        num_bytes, entries = contents(kept.path)
        problem = why_not_writable(kept.path)
        facts[kept.what] = {
            "folder": str(kept.path),
            "bytes": num_bytes,
            "files": entries,
            "writable": problem is None,
            "free_bytes": free_bytes(kept.path),
        }
        state = f"{size(num_bytes)} in {entries} files" if entries else "empty"
        lines.append((kept.what, f"{kept.path}: {state}, {'writable' if problem is None else f'not writable: {problem}'}"))
        if problem is not None:
            remedy = f"make it writable, or set {kept.variable} to a folder that is"
            problems.append(Problem(f"{kept.path} for {kept.what} cannot be written ({problem})", remedy))
        elif kept.what == NATIVE:
            problems += _not_executable(kept)
    if paths.engine_dir() is None:
        lines.append(("compiled programs", f"not kept: {paths.CACHE_VARIABLE} is empty"))
        what = f"{paths.CACHE_VARIABLE} is empty, so every start compiles its programs again"
        problems.append(Problem(what, f"unset {paths.CACHE_VARIABLE}, or set it to a folder"))
    if bucket := paths.engine_bucket():
        lines.append(("compiled programs", f"copied from and to {bucket}"))
    return Finding(facts=facts, lines=lines, problems=[*problems, *_full_disks()])


def places() -> list[Kept]:
    """All folders of this package, and the cache of the Hugging Face hub."""
    import huggingface_hub.constants

    engine = paths.engine_dir()
    programs = [] if engine is None else [Kept("compiled programs", engine, paths.CACHE_VARIABLE)]
    return [
        *programs,
        Kept(NATIVE, folders.cache_dir() / "native", "XDG_CACHE_HOME"),
        Kept("downloaded models", paths.models_dir(), "XDG_CACHE_HOME"),
        Kept("Hugging Face hub", Path(huggingface_hub.constants.HF_HUB_CACHE), "HF_HOME"),
        Kept("deployments", paths.deployments_dir(), "XDG_STATE_HOME"),
    ]


def contents(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files in a folder, without following links; zeros if it cannot be read."""
    num_bytes = entries = 0
    for status in _files(folder):
        num_bytes += status.st_size
        entries += 1
    return num_bytes, entries


def _files(folder: Path | str) -> Iterator[os.stat_result]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry.stat(follow_symlinks=False)
        except OSError:  # removed in the meantime
            continue


def why_not_writable(folder: Path) -> str | None:
    """Why a file cannot be created in a folder, or the folder in its nearest existing parent; None if it can."""
    if str(folder).startswith("~"):
        return "this user has no home folder"
    existing = nearest(folder)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
    except OSError as error:
        return error.strerror or str(error)
    free = free_bytes(folder)
    return f"its disk is full: {size(free)} are free" if free is not None and free < folders.ROOM else None


def nearest(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next((part for part in (path, *path.parents) if os.path.lexists(part)), Path("/"))


def free_bytes(path: Path) -> int | None:
    """Bytes that are free on the disk of a path; None if that is unknown."""
    try:
        usage = shutil.disk_usage(nearest(path))
    except OSError:
        return None
    return usage.free if usage.total else None


def _not_executable(kept: Kept) -> Iterator[Problem]:
    """A problem if libraries in this folder cannot be loaded because of how its disk is mounted."""
    flag = getattr(os, "ST_NOEXEC", 0)
    if os.statvfs(nearest(kept.path)).f_flag & flag:
        yield Problem(
            f"the disk of {kept.path} is mounted noexec, so the {kept.what} in it cannot be loaded",
            f"set {kept.variable} to a folder on another disk; until then CPU kernels run through XLA, which is slower",
        )


def _full_disks() -> Iterator[Problem]:
    """A problem for each folder of models whose disk has no room for one."""
    for kept in places():
        free = free_bytes(kept.path)
        if "models" in kept.what and free is not None and folders.ROOM <= free < LEAST_DISK:
            what = f"the disk of {kept.path} has {size(free)} left, too little for most models"
            yield Problem(
                what, f"free disk space (`fastgen cache --clear`), or set {kept.variable} to a folder on another disk"
            )
