"""Compiled programs in files: a later start loads them, where JAX's own cache would trace and lower each program again.

A file is a pickle with machine code in it: whoever can write to the folder can run code as the user of the engine. So only
folders are read that no other user can write to.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

import pallas_kernels
from fastgen_jax import version
from fastgen_jax.engine import saved_choices
from pallas_kernels import native
from pallas_kernels.folders import Folder, is_trusted, replace_file
from pallas_kernels.ragged_attention import measured_tiles

log = logging.getLogger(__name__)

_KERNELS = Path(pallas_kernels.__path__[0])
SUFFIX = ".executable"
MAX_FILES = 500  # of a folder; the oldest are dropped first
# Options of JAX that do not change programs: where caches are, what is logged, which platforms are looked for.
_OTHER_OPTIONS = ("cache", "log", "platform", "debug", "traceback", "distributed", "coordinator", "dump", "explain")


class _Hits(threading.local):
    """Programs that JAX took from its own cache in this thread."""

    count = 0

    def listen(self, event: str, **_: object) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


_hits = _Hits()
_prefetched: dict[tuple[Path, str], Future[jax.stages.Compiled | None]] = {}
jax.monitoring.register_event_listener(_hits.listen)


def key(arguments: Any, *facts: object, devices: Sequence[Any]) -> str:
    """The name of a program: different whenever anything differs that its code or its machine code depends on.

    `arguments` are what it is called with, arrays or shapes; `facts` are everything else that its function depends on, with
    a `repr` that is the same in every process; `devices` are those it runs on, or their descriptions by a compiler.
    """
    leaves, structure = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False), _placement(leaf)) for leaf in leaves]
    parts = (facts, str(structure), shapes, [_description(device) for device in devices], _surroundings(devices[0]))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def prefetch(folder: Folder, name: str, *, devices: Sequence[Any]) -> None:
    """Begins `load` in a thread, for a start that will probably want this program; `load` then waits for it."""

    def begin() -> jax.stages.Compiled | None:
        sources()  # a part of every name: all files are read
        return _load(folder, name, devices)

    pool = ThreadPoolExecutor(1, thread_name_prefix="fastgen-prefetch")
    _prefetched[folder.path, name] = pool.submit(begin)
    pool.shutdown(wait=False)


def forget_prefetched() -> None:
    """Drops programs of `prefetch` that were not asked for."""
    _prefetched.clear()


def load(folder: Folder, name: str, *, devices: Sequence[Any]) -> jax.stages.Compiled | None:
    """The program called `name` that an earlier process saved, ready to run on `devices`; None if there is none.

    The log says why a program that exists is not loaded.
    """
    begun = _prefetched.pop((folder.path, name), None)
    return _load(folder, name, devices) if begun is None else begun.result()


def _load(folder: Folder, name: str, devices: Sequence[Any]) -> jax.stages.Compiled | None:
    path = folder.path / (name + SUFFIX)
    if not path.exists():
        return None
    if not is_trusted(folder.path):
        log.warning("programs in %s are not loaded: other users can write to it", folder.path)
        return None
    marker = path.with_suffix(".loading")
    if _died_loading(marker):
        log.warning("%s is not loaded: the process that tried it last did not survive; the program is compiled", path)
        return None
    try:
        with _marked(marker if folder.writable else None):
            payload, in_tree, out_tree, kernels = pickle.loads(zlib.decompress(path.read_bytes()))
            for library, symbols in kernels:  # which tracing would have loaded
                native.load(library, symbols)
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
            )
    except Exception as error:  # of pickle, zlib, JAX and the device's runtime
        log.warning("%s is not loaded (%s); the program is compiled", path, " ".join(repr(error).split())[:300])
        return None


def compile_and_save(lowered: jax.stages.Lowered, folder: Folder, name: str) -> jax.stages.Compiled:
    """Compiles a program and saves it for `load`. If it cannot be saved, the log says why."""
    hits = _hits.count
    program = lowered.compile()
    if hits == _hits.count or jax.default_backend() != "cpu":
        save(folder, name, program)
    return program


def save(folder: Folder, name: str, program: jax.stages.Compiled) -> bool:
    """Saves a compiled program for `load`; returns whether it could be. The log says why not.

    On a CPU, a program that JAX loaded from its own cache would be saved without its machine code.
    """
    if not folder.writable:
        return False
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        contents = zlib.compress(pickle.dumps((*serialize_executable.serialize(program), _kernels(program))), 1)
        path = folder.path / (name + SUFFIX)
        replace_file(path, contents)
        path.with_suffix(".loading").unlink(missing_ok=True)
        for old in sorted(folder.path.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)[:-MAX_FILES]:
            old.unlink(missing_ok=True)
    except Exception as error:  # runtimes without serialization raise errors of several types
        log.info("a compiled program is not saved (%s)", " ".join(repr(error).split())[:300])
        return False
    return True


def _kernels(program: jax.stages.Compiled) -> list[tuple[str, dict[str, str]]]:
    """The arguments of `native.load` for the libraries that a program calls."""
    text = program.as_text() or ""
    return [
        (library, symbols)
        for library, symbols in native.requests().items()
        if any(f'"{target}"' in text for target in symbols)
    ]


def _placement(leaf: Any) -> str:
    sharding = getattr(leaf, "sharding", None)
    return str(sharding.spec) if isinstance(sharding, NamedSharding) else ""


def _description(device: Any) -> tuple[object, ...]:
    """What distinguishes a device to a compiler; not its number or host."""
    if device.platform == "cpu":
        return ("cpu", saved_choices.machine())
    names = ("coords", "core_on_chip", "compute_capability", "core_count")
    return (device.platform, device.device_kind, *(getattr(device, name, None) for name in names))


def _surroundings(device: Any) -> tuple[object, ...]:
    """What programs depend on besides their function and its arguments: software, settings, measured tiles."""
    options = {
        name: value
        for name, value in jax.config.values.items()
        if not any(other in name for other in _OTHER_OPTIONS) and isinstance(value, str | int | float | None)
    }
    return (
        sources(),
        jax.__version__,
        " ".join(device.client.platform_version.split()),
        sorted(options.items()),
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        device.platform == "cpu" and native.origin(),
        device.platform != "cpu" and measured_tiles.entries(measured_tiles.measured_file()),
    )


@functools.cache
def sources() -> str:
    """A digest of this package and its kernels: a changed line may be a changed program."""
    digest = hashlib.sha256()
    for root in (Path(version.__file__).parent, _KERNELS):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".cc", ".h"):
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _died_loading(marker: Path) -> bool:
    """Whether a process died while it loaded a program: a runtime may crash on one that was compiled elsewhere."""
    try:
        number, start = marker.read_text().split()
        return psutil.Process(int(number)).create_time() != float(start)
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, psutil.Error):
        return False


@contextlib.contextmanager
def _marked(marker: Path | None) -> Iterator[None]:
    if marker is None:
        yield
        return
    process = psutil.Process()
    marker.write_text(f"{process.pid} {process.create_time()}")  # in containers, numbers alone repeat
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)
