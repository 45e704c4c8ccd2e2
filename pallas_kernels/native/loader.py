"""Compiles, caches, loads and registers one C++ source. See the package docstring."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import folders
from pallas_kernels.native.compiler import Compiler, CompilerError, find_compiler

_log = logging.getLogger(__name__)
_HEADERS = Path(__file__).parent

_lock = threading.RLock()
_outcomes: dict[str, str | None] = {}  # name of a library -> None if loaded, otherwise the reason why not
_loaded: dict[str, ctypes.CDLL] = {}  # keeps the code that XLA points to mapped
_requests: list[tuple[str, Path, dict[str, str]]] = []  # the arguments of successful calls of `load`


def available() -> bool:
    """True if native kernels are not turned off and a C++ compiler is found. Never raises."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why native kernels cannot be built here, in one sentence; None if they can. Never raises."""
    if os.environ.get("PALLAS_KERNELS_NATIVE", "1").lower() in ("0", "false", "off"):
        return "PALLAS_KERNELS_NATIVE=0 turns native kernels off"
    compiler = _compiler()
    return compiler if isinstance(compiler, str) else None


def load(name: str, source: Path, symbols: Mapping[str, str]) -> bool:
    """Makes the functions of a C++ source callable through `jax.ffi.ffi_call` on the CPU; True if it succeeds.

    The first call for a `name` compiles (seconds) or opens the cached library (milliseconds); later calls
    return the outcome of the first. Call it while tracing, before `ffi_call`. Never raises: if it returns
    False, the reason has been logged, and the caller uses plain XLA.

    Args:
      name: name of the library; part of its file name.
      source: the `.cc` file. It may include the headers beside it, those beside this file, and "xla/ffi/api/ffi.h".
      symbols: name of the FFI target -> C symbol of its handler.
    """
    with _lock:
        reason = unavailable_reason()
        if reason is None and name not in _outcomes:
            try:
                library = _open(name, source)
                _register(library, symbols)
                _loaded[name] = library
                _requests.append((name, source, dict(symbols)))
                _outcomes[name] = None
            except Exception as error:  # a missing kernel must not stop the caller
                _outcomes[name] = str(error)
        if reason is None:
            reason = _outcomes[name]
        if reason is not None:
            _log_once(name, reason)
        return reason is None


def requests() -> list[tuple[str, Path, dict[str, str]]]:
    """The arguments of `load` for each library that this process has loaded."""
    with _lock:
        return list(_requests)


def function(name: str, symbol: str) -> Any:
    """The C function `symbol` of a library that `load(name, ...)` has loaded, for `ctypes` calls.

    Raises `KeyError` if the library is not loaded.
    """
    return getattr(_loaded[name], symbol)


@functools.cache
def _log_once(name: str, reason: str) -> None:
    # A failure despite a working compiler deserves a warning; a machine without a compiler does not.
    level = logging.INFO if unavailable_reason() else logging.WARNING
    _log.log(level, "native kernels of %r are not used; plain XLA is used instead: %s", name, reason)


@functools.cache
def _compiler() -> Compiler | str:
    """The compiler, or the reason why there is none."""
    try:
        return find_compiler()
    except CompilerError as error:
        return str(error)
    except Exception as error:  # `available` never raises
        return f"looking for a C++ compiler failed: {error!r}"


def _register(library: ctypes.CDLL, symbols: Mapping[str, str]) -> None:
    for target, symbol in symbols.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu", api_version=1)


def _open(name: str, source: Path) -> ctypes.CDLL:
    path = _build(name, source)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A complete library that does not load, for example after a system update: build it again.
        with contextlib.suppress(OSError):
            path.unlink()
        return ctypes.CDLL(str(_build(name, source, take_ready=False)))


def _build(name: str, source: Path, *, take_ready: bool = True) -> Path:
    """Path of the library built from `source`, which is compiled unless a complete library exists already."""
    compiler = _compiler()
    assert isinstance(compiler, Compiler)
    headers = sorted({*source.parent.glob("*.h"), *_HEADERS.glob("*.h")})
    sources = b"\0".join(path.read_bytes() for path in (source, *headers))
    file_name = f"{name}-{compiler.key(sources)}.so"
    wanted = library_folder()
    if take_ready and folders.is_trusted(wanted) and _is_whole(wanted / file_name):
        return wanted / file_name
    folder = folders.settle(wanted, "native kernels", variable="XDG_CACHE_HOME", reading=False, private=True)
    if folder is None:
        raise OSError(f"there is no folder to build them in; make {wanted} writable")
    path = folder.path / file_name
    if _is_whole(path):
        return path
    with _exclusive(path.with_name(f"{file_name}.lock")):
        if not _is_whole(path):  # another process may have built it while this one waited
            handle, partial = tempfile.mkstemp(prefix=f"{file_name}.", suffix=".tmp", dir=folder.path)
            os.close(handle)
            try:
                _log.info("compiling %s with %s (once per machine)", source.name, compiler.command[0])
                include = (_HEADERS, Path(jax.ffi.include_dir()))
                compiler.compile(source, Path(partial), include=include)
                digest = _digest(Path(partial))
                os.replace(partial, path)
                folders.replace_file(_digest_file(path), digest.encode())
            finally:
                Path(partial).unlink(missing_ok=True)
    return path


def library_folder() -> Path:
    """Where built libraries are kept."""
    return folders.cache_dir() / "native"


def _is_whole(path: Path) -> bool:
    """Whether a library is complete. Opening one truncated by a full disk would crash the process."""
    try:
        return _digest_file(path).read_text() == _digest(path)
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a lock between processes, so that eight workers compile once. Continues without it if locking fails."""
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
