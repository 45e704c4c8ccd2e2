"""Finds or compiles, caches, loads and registers C++ libraries. See the package docstring."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import folders
from pallas_kernels.native import prebuilt, sources
from pallas_kernels.native.compiler import Compiler, CompilerError, end_all, find_compiler
from pallas_kernels.native.prebuilt import Prebuilt, Refusal

_log = logging.getLogger(__name__)

_lock = threading.RLock()
_outcomes: dict[str, str | None] = {}  # name of a library -> None if loaded, otherwise the reason why not
_loaded: dict[str, ctypes.CDLL] = {}  # keeps the code that XLA points to mapped
_symbols: dict[str, dict[str, str]] = {}  # name of a loaded library -> its symbols, as given to `load`
_builds: dict[str, Build] = {}
_compilers = threading.BoundedSemaphore(max(1, os.cpu_count() or 1))  # how many run at the same time
_ending = threading.Event()
_END_TIMEOUT_S = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """A library that is being compiled, or was, by a thread of its own.

    Attributes:
      name: a key of `sources.SOURCES`.
      path: the future path of the library; its exception says why there is none.
    """

    name: str
    path: Future[Path]


def available() -> bool:
    """True if native kernels are not turned off, and were prebuilt for this CPU or a C++ compiler is found.

    Raises `ValueError` if the environment variable PALLAS_KERNELS_ISA does not fit the CPU.
    """
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why there are no native kernels here, in one sentence; None if there are. Raises as `available` does."""
    if os.environ.get("PALLAS_KERNELS_NATIVE", "1").lower() in ("0", "false", "off"):
        return "PALLAS_KERNELS_NATIVE=0 turns native kernels off"
    if isinstance(_prebuilt(), Prebuilt):
        return None
    compiler = _compiler()
    return compiler if isinstance(compiler, str) else None


def origin() -> str:
    """Where native kernels come from: a prebuilt library, a compiler, or nowhere and why. Raises as `available` does."""
    reason = unavailable_reason()
    if reason is not None:
        return f"none: {reason}"
    found = _prebuilt()
    if isinstance(found, Prebuilt):
        return f"prebuilt for {found.isa}"
    compiler = _compiler()
    assert isinstance(compiler, Compiler)
    return f"compiled by {' '.join((*compiler.command, *(flag for flag in compiler.flags if flag.startswith('-m'))))}"


def prefetch(names: Iterable[str], *, on_done: Callable[[str], object] | None = None) -> tuple[Build, ...]:
    """Starts to compile what `load` would have to compile, and returns at once.

    Compilers run beside each other, and beside everything else that this process does; `load` waits for its own library
    only. They are ended with the process.

    Args:
      names: keys of `sources.SOURCES`; the slowest to compile should come first.
      on_done: called with each name that is being compiled once it is, or has failed, by another thread.

    Returns:
      What is being compiled: nothing if the libraries are prebuilt or cached, or there is no compiler.

    Raises:
      ValueError: as `available`.
    """
    if unavailable_reason() is not None or isinstance(_prebuilt(), Prebuilt):
        return ()
    with _lock:
        missing = [name for name in names if name not in _outcomes and _ready(name, sources.SOURCES[name]) is None]
        builds = tuple(_start(name, sources.SOURCES[name]) for name in missing)
    if on_done is not None:
        for build in builds:
            build.path.add_done_callback(lambda _, name=build.name: on_done(name))
    return builds


def load(name: str, symbols: Mapping[str, str], *, source: Path | None = None) -> bool:
    """Makes the functions of a C++ library callable through `jax.ffi.ffi_call` on the CPU; True if it succeeds.

    The first call for a `name` opens a prebuilt or cached library (milliseconds), waits for one that `prefetch` has
    started, or compiles it (seconds); later calls return the outcome of the first. Call it while tracing, before
    `ffi_call`. If it returns False, the reason has been logged, and the caller uses plain XLA.

    Args:
      name: name of the library; a key of `sources.SOURCES` unless there is a `source`.
      symbols: name of the FFI target -> C symbol of its handler.
      source: a `.cc` file that is not one of `sources.SOURCES`. It may include the headers beside it and those beside this
        file.

    Raises:
      ValueError: as `available`.
    """
    reason = unavailable_reason()
    if reason is None and name not in _outcomes:
        outcome = None
        try:
            library = _registered(name, symbols, source)
        except Exception as error:  # a missing kernel must not stop the caller
            library, outcome = None, str(error)
        with _lock:
            if name not in _outcomes:
                if library is not None:
                    _loaded[name] = library
                    _symbols[name] = dict(symbols)
                _outcomes[name] = outcome
    elif reason is None and _outcomes[name] is None:
        with _lock:  # a saved program may have loaded the library for fewer functions
            more = {target: symbol for target, symbol in symbols.items() if target not in _symbols[name]}
            _register(_loaded[name], more)
            _symbols[name] |= more
    if reason is None:
        reason = _outcomes[name]
    if reason is not None:
        _log_once(name, reason)
    return reason is None


def requests() -> dict[str, dict[str, str]]:
    """The name and the symbols of each library that this process has loaded, as given to `load`."""
    with _lock:
        return dict(_symbols)


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


# ---- prebuilt libraries ----------------------------------------------------------------------------------------------


@functools.cache
def _prebuilt() -> Prebuilt | Refusal:
    """The prebuilt library that this process uses, once it has been opened, or why there is none."""
    found = prebuilt.find(prebuilt.FOLDER, Path(jax.ffi.include_dir()))
    if isinstance(found, Prebuilt):
        try:
            ctypes.CDLL(str(found.path))
        except OSError as error:
            found = Refusal(reason=f"the prebuilt library {found.path} cannot be opened: {error}", expected=False)
    if isinstance(found, Prebuilt):
        _log.info("native kernels: prebuilt for %s", found.isa)
    else:
        level = logging.DEBUG if found.expected else logging.WARNING
        _log.log(level, "%s; kernels are compiled on this machine if there is a C++ compiler", found.reason)
    return found


# ---- compiling -------------------------------------------------------------------------------------------------------


@functools.cache
def _compiler() -> Compiler | str:
    """The compiler, or the reason why there is none."""
    try:
        return find_compiler()
    except CompilerError as error:
        return str(error)
    except OSError as error:
        return f"looking for a C++ compiler failed: {error!r}"


def _register(library: ctypes.CDLL, symbols: Mapping[str, str]) -> None:
    for target, symbol in symbols.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu", api_version=1)


def _registered(name: str, symbols: Mapping[str, str], source: Path | None) -> ctypes.CDLL:
    """The library, after XLA has been told of its functions."""
    found = _prebuilt()
    if source is None and isinstance(found, Prebuilt):
        library = ctypes.CDLL(str(found.path))
        try:
            _register(library, symbols)
            return library
        except Exception as error:  # an XLA that no longer accepts what the wheel was made for, or a symbol is missing
            _log.warning("XLA refuses the prebuilt kernel %r, which is compiled instead: %s", name, error)
    library = _open(name, sources.SOURCES[name] if source is None else source)
    with _lock:
        if name not in _outcomes:
            _register(library, symbols)
    return library


def _open(name: str, source: Path) -> ctypes.CDLL:
    with _lock:
        path = _ready(name, source)
        build = _start(name, source) if path is None else None
    if build is not None:
        path = build.path.result()
    assert path is not None, "a library is ready or being built"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A complete library that does not load, for example after a system update: build it again.
        with contextlib.suppress(OSError):
            path.unlink()
        return ctypes.CDLL(str(_build(name, source)))


def _start(name: str, source: Path) -> Build:
    """The build of a library, which is started unless it has been."""
    if name not in _builds:
        path: Future[Path] = Future()

        def run() -> None:
            try:
                with _compilers:
                    if _ending.is_set():
                        raise CompilerError("the process is ending")
                    path.set_result(_build(name, source))
            except BaseException as error:  # whoever waits for the library gets it
                path.set_exception(error)

        _builds[name] = Build(name=name, path=path)
        # A daemon, so that the process can end without waiting for the compiler, which is then ended too.
        threading.Thread(target=run, name=f"compile {name}", daemon=True).start()
    return _builds[name]


@atexit.register
def _end_builds() -> None:
    """A process that ends leaves neither compilers nor incomplete libraries behind."""
    _ending.set()
    end_all()
    wait([build.path for build in _builds.values()], timeout=_END_TIMEOUT_S)


def _file_name(name: str, source: Path) -> str:
    compiler = _compiler()
    assert isinstance(compiler, Compiler)
    return f"{name}-{compiler.key(sources.contents(source))}.so"


def _ready(name: str, source: Path) -> Path | None:
    """The library if an earlier process has compiled it."""
    if isinstance(_compiler(), str):
        return None
    path = library_folder() / _file_name(name, source)
    return path if folders.is_trusted(path.parent) and _is_whole(path) else None


def _build(name: str, source: Path) -> Path:
    """Path of the library compiled from `source`, by this process or another one that started at the same time."""
    compiler = _compiler()
    if isinstance(compiler, str):
        raise CompilerError(compiler)
    wanted = library_folder()
    folder = folders.settle(wanted, "native kernels", variable="XDG_CACHE_HOME", reading=False, private=True)
    if folder is None:
        raise OSError(f"there is no folder to build them in; make {wanted} writable")
    path = folder.path / _file_name(name, source)
    if _is_whole(path):
        return path
    with _exclusive(path.with_name(f"{path.name}.lock")):
        if not _is_whole(path):  # another process may have built it while this one waited
            for left_over in folder.path.glob(f"{path.name}.*.tmp"):  # of a process that was killed
                left_over.unlink(missing_ok=True)
            handle, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=folder.path)
            os.close(handle)
            try:
                _log.info("compiling the kernel %s with %s (once per machine)", name, compiler.command[0])
                start = time.monotonic()
                compiler.compile(source, Path(partial), include=(sources.HEADERS, Path(jax.ffi.include_dir())))
                digest = _digest(Path(partial))
                os.replace(partial, path)
                folders.replace_file(_digest_file(path), digest.encode())
                _log.info("compiled the kernel %s in %.1f s", name, time.monotonic() - start)
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
