"""JAX's persistent cache of compiled programs: where it is, and what happens when it fails."""

from __future__ import annotations

import contextlib
import glob
import importlib
import logging
import math
import re
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, TextIO

import jax

from fastgen_jax import paths
from fastgen_jax.engine.mirror import Mirror
from pallas_kernels.buckets import Bucket
from pallas_kernels.folders import Folder
from pallas_kernels.jax_versions import AUTOTUNING_KEPT, too_old

log = logging.getLogger(__name__)

FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'")
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # the first bytes of its output; JAX uses it if it is installed, else zlib

_mirrors: dict[Path, Mirror] = {}  # by folder


def use(named: str | None, group: str) -> Folder | None:
    """The folder for compiled programs and measurements, which becomes JAX's cache unless the user has set one.

    `named` as in `EngineConfig.compile_cache_dir`. None: nothing is kept. Of a bucket only the files of `group` are used,
    a name for what can be shared; they are fetched first, once per process.
    """
    _log_failures()
    wanted, url = paths.engine_dir(named), paths.engine_bucket(named)
    if wanted is not None and url is not None:
        wanted /= group
    folder = None if wanted is None else paths.settle_engine(wanted)
    if folder is not None and url is not None and folder.writable and folder.path not in _mirrors:
        mirror = _mirrors[folder.path] = Mirror(
            bucket=Bucket(f"{url.rstrip('/')}/{group}"), folder=folder.path, is_whole=_can_send
        )
        mirror.fetch()
    if folder is None or _path() is not None:
        return folder
    programs = Folder(path=folder.path / "xla", writable=False)
    if folder.writable:
        programs = paths.settle_engine(programs.path)
    if programs is None or not programs.path.is_dir():
        return folder
    jax.config.update("jax_compilation_cache_dir", str(programs.path))
    # The default skips programs that compile within a second; here each one delays the first token.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Of XLA's own caches, next to the entries, the one of the algorithms that were measured to be fastest on a GPU, so that
    # other programs with the same products need not measure again. Before jax 0.12 its path is part of every key, and XLA
    # fails if it cannot write it.
    tuned = jax.default_backend() == "gpu" and programs.writable and too_old(AUTOTUNING_KEPT) is None
    kept = "xla_gpu_per_fusion_autotune_cache_dir" if tuned else "none"
    jax.config.update("jax_persistent_cache_enable_xla_caches", kept)
    if not programs.writable:
        _write_no_more()
    return folder


def send(folder: Folder | None) -> None:
    """Sends what is new in `folder` to its bucket, if it has one."""
    mirror = None if folder is None else _mirrors.get(folder.path)
    if mirror is not None:
        mirror.send()


def send_soon(folder: Folder | None) -> None:
    """Does `send` in a thread that Python waits for before it exits."""
    if folder is not None and folder.path in _mirrors:
        threading.Thread(target=send, args=(folder,), name="fastgen-cache").start()


def _can_send(path: Path, contents: bytes) -> bool:
    """Whether a file is complete: JAX writes its entries in place."""
    return not path.name.endswith("-cache") or _is_whole(contents)


def _log_failures() -> None:
    """Logs JAX's warnings about its cache from now on, even if warnings are errors, and removes damaged entries.

    JAX never replaces an entry: every start would compile a program again if a full disk had truncated its entry. The
    entry is therefore removed before JAX writes it again. After a failed write, nothing more is written, since other
    writes would fail too. Set for the whole process, since programs are compiled in several threads, and a context that
    changes warnings is not safe there.
    """
    warnings.filterwarnings("always", message=FAILURE.pattern)
    show: Any = warnings.showwarning
    if getattr(show, "logs_cache_failures", False):
        return

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        failure = FAILURE.match(str(message))
        if failure is None:
            show(message, category, filename, lineno, file, line)
            return
        log.warning("%s (in %s); the program is compiled and the run continues", message, _path())
        drop_broken(failure[2])
        if failure[1] == "writing":
            _write_no_more()

    vars(note)["logs_cache_failures"] = True
    warnings.showwarning = note


def drop_broken(program: str) -> None:
    """Removes truncated or damaged entries of a program, which is identified by its name in JAX."""
    folder = _path()
    if folder is None or "://" in folder:
        return
    for path in Path(folder).glob(f"{glob.escape(program)}-*-cache"):
        with contextlib.suppress(OSError):  # another process may have removed it, or the folder is read-only
            if not _is_whole(path.read_bytes()):
                path.unlink()


def _is_whole(entry: bytes) -> bool:
    """Whether an entry can be decompressed; true without the decompressor, since JAX does not read the entry either."""
    try:
        if entry.startswith(ZSTANDARD):
            importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "zstandard").decompress(entry)
        else:
            zlib.decompress(entry)
    except ImportError:
        return True
    except Exception:  # each library has its own
        return False
    return True


def _path() -> str | None:
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (defined at run time)


def _write_no_more() -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
